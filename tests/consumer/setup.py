"""Someone else's extension on top of an installed qcow2x."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import qcow2x

setup(
    name="q2consumer",
    version="1",
    ext_modules=cythonize(
        [Extension("q2consumer", ["q2consumer.pyx"], include_dirs=[qcow2x.get_include()])],
        language_level=3,
    ),
)
