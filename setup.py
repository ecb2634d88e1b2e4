"""Lets `pip install --editable` install data files, as `pip install` does; all else stands in pyproject.toml.

Building an editable wheel, setuptools asks the distribution for `has_data`; its own name for that is `has_data_files`.
"""

import setuptools


class Distribution(setuptools.Distribution):
    """Distribution whose data files an editable wheel finds."""

    has_data = setuptools.Distribution.has_data_files


setuptools.setup(distclass=Distribution)
