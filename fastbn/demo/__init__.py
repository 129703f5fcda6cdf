"""A small neural network in NumPy, trained with :class:`fastbn.BatchNorm`: to read and to copy."""

import importlib
from typing import Any


class DemoError(ValueError):
    """Something the user can mend: an option, a file, a missing extra. Its text is one line."""


def require(module: str, extra: str = "demo") -> Any:
    """Import a module that only an extra of fastbn brings along.

    Raises
    ------
    DemoError
        If it cannot be imported; the text says what to install, or what is wrong with it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DemoError(f'{error}: pip install "fastbn[{extra}]"') from error
    except Exception as error:  # of its configuration: matplotlib, for one, refuses MPLBACKEND
        raise DemoError(f"{module} cannot be imported: {' '.join(str(error).split())}") from error
