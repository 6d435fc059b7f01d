"""``resnet-fast demo``: the package's promises, kept on real data, with a report to look at.

command.py      the command
data.py         handwritten digits and photographs, all from installed packages
training.py     a small ResNet learns the digits
study.py        what is checked and measured on a model
report.py       the report, from ``report.html`` and charts
"""
