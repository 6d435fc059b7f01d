"""Metadata lives in pyproject.toml; here is only what it cannot say: the packages, and the version's place.

``resnet_fast/kernels`` is a link to ``kernels/`` (a namespace package, so that a checkout never shadows Hugging Face's
package of that name), which the automatic discovery would follow to a top-level ``kernels``.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

version = re.search(r'__version__ = "(.+)"', Path("resnet_fast/__init__.py").read_text())[1]

setup(
    version=version,
    packages=find_namespace_packages(include=["resnet_fast", "resnet_fast.*"], exclude=["*__pycache__*"]),
    package_data={"resnet_fast": ["py.typed"], "": ["*.json", "*.html"]},
)
