"""Where the C headers are, for extensions that cimport qcow2x."""

import os


def get_include() -> str:
    """The folder to put into `include_dirs`: it holds `qcow2x/format.h` and its siblings.

    Works for an installed package and for a source checkout that was built in place.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "include")
    if os.path.isdir(installed):
        return installed
    return os.path.join(os.path.dirname(package), "include")
