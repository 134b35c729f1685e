"""The quantisation methods, one file or folder each, or a file of the user's; its name is the key.

A method's code defines one of these at its top level:

- round(target, hessian, grid) -> codes: a rounding rule; all the rest of a calibration comes with
  it, see calibration/blocks/rounding.py and docs/methods.md.
- quantize(weight, bias, scheme) -> QuantArrays: looks at weights alone.
- METHOD: a BlockMethod of calibration/blocks/driver.py, for what neither can say.

Besides, if need be, SETTINGS, the type of its switches, and DECLARATION. A folder has these two in
settings.py, which imports nothing heavy, and its code in method.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from calibration.quant.scheme import KEPT
from calibration.settings import CalibrationSettings, MethodSettings
from plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.blocks.driver import BlockMethod
    from calibration.quant.scheme import QuantScheme
    from plugins.core.op_spec import QuantArrays

    Quantize = Callable[[np.ndarray, np.ndarray | None, QuantScheme], QuantArrays]

__all__ = ["PLAIN_METHOD", "Declaration", "Method", "find_method", "method_names"]

PLAIN_METHOD = "rtn"  # keeps the weights what they are, for every op
_SUFFIX = ".py"


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What others have to know of a method before they run it.

    What depends on its switches is asked of its BlockMethod.

    Attributes:
        op: the op that it is made for: bits that this op cannot take are refused, and so is every
            other op where both could. None takes QQQGemm where it takes the bits, else ABQGemm.
        codes: types of the codes that it makes; an op that stores others is refused.
        counts_processes: how many processes share the windows changes the result, if only by the
            order of sums.
    """

    op: str | None = None
    codes: tuple[str, ...] = ("int8", "uint8")
    counts_processes: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.codes, str):
            raise TypeError(f'codes is a tuple, ("{self.codes}",)')


@cache
def method_names() -> tuple[str, ...]:
    """Names of every method of the package, sorted."""
    found = [
        path
        for path in Path(__file__).parent.iterdir()
        if path.suffix == _SUFFIX or (path / "__init__.py").is_file()
    ]
    return tuple(sorted(path.stem for path in found if path.stem != "__init__"))


class Method:
    """A method by its name; its code is imported when it is first asked for.

    Attributes:
        name: as schemes and folders record it.
        file: where it is if it is not one of the package.
    """

    def __init__(self, name: str, file: Path | None = None) -> None:
        self.name, self.file = name, file

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"method {self.name!r}"

    @property
    def _is_folder(self) -> bool:
        return self.file is None and (Path(__file__).parent / self.name).is_dir()

    @cached_property
    def _declared(self) -> ModuleType:
        """Holds SETTINGS and DECLARATION."""
        if self._is_folder:
            return importlib.import_module(f"{__name__}.{self.name}.settings")
        return self._code

    @cached_property
    def _code(self) -> ModuleType:
        """Holds round, quantize or METHOD."""
        if self.file is not None:
            module = _imported(self.file)
        else:
            end = ".method" if self._is_folder else ""
            module = importlib.import_module(f"{__name__}.{self.name}{end}")
        found = [name for name in ("round", "quantize", "METHOD") if hasattr(module, name)]
        if len(found) != 1:
            raise InputError(
                self.where,
                f"got {' and '.join(found) or 'none of them'} in its file, expected one of "
                f"round(target, hessian, grid), quantize(weight, bias, scheme) and METHOD",
                "See docs/methods.md for a file to copy",
            )
        if found == ["round"] and not _arguments(module.round):
            raise InputError(
                self.where,
                f"got round{inspect.signature(module.round)}, expected "
                "round(target, hessian, grid) or round(target, hessian, grid, settings)",
                "Take these arguments, in this order",
            )
        return module

    @cached_property
    def declaration(self) -> Declaration:
        """What it says of itself.

        Raises:
            InputError: DECLARATION is something else.
        """
        found = getattr(self._declared, "DECLARATION", Declaration())
        if not isinstance(found, Declaration):
            raise InputError(
                self.where,
                f"got DECLARATION = {found!r}, expected a Declaration of {__name__}",
                "See docs/methods.md for one to copy",
            )
        return found

    @cached_property
    def settings(self) -> type[MethodSettings]:
        """The type of its switches.

        Raises:
            InputError: SETTINGS is no such type.
        """
        from calibration.blocks.settings import WalkSettings

        least = WalkSettings if hasattr(self._declared, "round") else MethodSettings
        kind: Any = getattr(self._declared, "SETTINGS", least)
        if hasattr(self._declared, "quantize") and kind is not MethodSettings:
            raise InputError(
                self.where,
                "got SETTINGS beside quantize(weight, bias, scheme), which takes none, expected "
                "no SETTINGS",
                "Leave them out, or define round(target, hessian, grid, settings)",
            )
        if (
            not isinstance(kind, type)
            or not issubclass(kind, least)
            or "__dataclass_fields__" not in vars(kind)
        ):
            raise InputError(
                self.where,
                f"got SETTINGS = {kind!r}, expected a dataclass derived from {least.__name__} of "
                f"{least.__module__}",
                "See docs/methods.md for switches to copy",
            )
        for switch in fields(kind):
            if type(switch.default) not in (bool, int, float) and "choices" not in switch.metadata:
                raise InputError(
                    self.where,
                    f"got the switch {switch.name} with the default {switch.default!r}, expected a "
                    "bool, int or float",
                    'Give it such a default, or metadata={"choices": ("one", "other")}',
                )
        return kind

    @property
    def looks_at_data(self) -> bool:
        """Whether it is a block method: it wants calibration windows."""
        return not hasattr(self._code, "quantize")

    @property
    def quantize(self) -> Quantize:
        """Codes of one linear by weight [N, K] of any float type and bias [N] or None, of a method
        that looks at weights alone.
        """
        made: Quantize = self._code.quantize
        return made

    @cached_property
    def block_method(self) -> BlockMethod:
        """Of a method that looks at data."""
        if hasattr(self._code, "METHOD"):
            made: BlockMethod = self._code.METHOD
            return made
        from calibration.blocks.rounding import RoundingMethod

        function, count = self._code.round, _arguments(self._code.round)
        return RoundingMethod(lambda *given: function(*given[:count]))

    def makes(self, scheme: QuantScheme) -> bool:
        """Whether its codes are of the type that the scheme's op stores."""
        return _code_type(scheme) in self.declaration.codes

    def check(self, scheme: QuantScheme) -> None:
        """Its codes against the op, before any work.

        Raises:
            InputError: the op stores other codes.
        """
        if not self.makes(scheme):
            raise InputError(
                self.where,
                f"got {' or '.join(self.declaration.codes)} codes, expected "
                f"{_code_type(scheme)}, which {scheme.op} stores, the op of {scheme.label}",
                f"Choose bits, groups or --act-quant that another op than {scheme.op} takes, or "
                f"declare in the method which op it is for",
            )

    def check_settings(self, settings: CalibrationSettings) -> None:
        """The switches that it is to run with.

        Raises:
            InputError: they are another method's.
        """
        known = {item.name for item in fields(self.settings)}
        missing = sorted(known - set(vars(settings.method)))
        if missing:
            raise InputError(
                self.where,
                f"got {type(settings.method).__name__} without {', '.join(missing)}, expected "
                f"{self.settings.__name__}",
                f"Give CalibrationSettings(method={self.settings.__name__}())",
            )


def _arguments(rule: Callable[..., Any]) -> int:
    """How many of (target, hessian, grid, settings) a rounding rule takes: 4, 3, or 0 for neither."""
    for count in (4, 3):
        try:
            inspect.signature(rule).bind(*range(count))
        except TypeError:
            continue
        return count
    return 0


def _code_type(scheme: QuantScheme) -> str:
    from plugins import op_spec

    codes, *_ = op_spec(scheme.op).arrays(scheme.attributes(1, max(1, scheme.group_size), False))
    return codes.dtype


def _imported(file: Path) -> ModuleType:
    name = f"anybit_method_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(
            "--method", f"got no such file {file}, expected a .py file", "Check the path"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            str(file),
            f"got {type(error).__name__}: {error}; expected a file that Python imports",
            f"Run python {file.name} to see where",
        ) from error
    return module


def find_method(name: str, file: Path | None = None) -> Method:
    """The method called `name`, one of the package or that of a file.

    Raises:
        InputError: no such method, or a file that is called as one of the package.
    """
    if file is None and name not in method_names():
        raise InputError(
            f"method {name!r}",
            f"unknown, expected one of {', '.join(method_names())}, or the path of a .py file",
            "Check the spelling",
        )
    if file is not None and name in (*method_names(), "auto", KEPT):
        raise InputError(
            f"--method {file}",
            f"got a file with the name of the method {name!r}, expected one of its own",
            "Rename the file: folders and reports know a method by its name",
        )
    changed = file.stat().st_mtime_ns if file is not None and file.is_file() else 0
    return _method(name, file, changed)


@cache
def _method(name: str, file: Path | None, changed: int) -> Method:
    """One object per state of a file, so that its code runs once and an edited file anew."""
    return Method(name, file)
