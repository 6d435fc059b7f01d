"""``resnet-fast demo``: the package's promises, kept on real data, with a report to look at.

command.py      the command
digits.py       a ResNet-18 learns handwritten digits
photographs.py  eight photographs, from installed packages
study.py        what is checked and measured on a model
report.py       the report, from ``report.html`` and charts
"""
