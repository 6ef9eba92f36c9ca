"""A graded cell asks first whether the answer is yours: `own_work.check(answer)`.

The package holds what the chapters build, so an import could stand in for an answer.  An answer passes if it was written in the
notebook and uses of the package only what the chapter itself imports, and nothing of the modules that the chapter builds.  What
it calls is looked at as well, as far as that was written in the notebook too.

This stops what happens in passing, not what is done on purpose: code can be copied, by hand, from anywhere.
"""

import dis
import sys
from inspect import unwrap
from types import CodeType, FunctionType, ModuleType

GIVEN: set[str] = set()  # what the chapter imports of the package; a student version comes with its chapter's list
BUILT: set[str] = set()  # modules that the chapter builds


def check(*answers: FunctionType | type) -> None:
    """Passes in silence if these functions and classes were written in the notebook that calls this.

    Raises:
        AssertionError: one of them, or something that it uses, comes from the package; the message names it.
    """
    notebook = sys._getframe(1).f_globals
    for answer in answers:
        answer = unwrap(answer)
        if not (is_from(notebook, answer) and isinstance(answer, FunctionType | type)):
            name = getattr(answer, "__name__", repr(answer))
            raise AssertionError(f"{name} is to be written here, with def or class, not imported")
        for found in foreign(answer, notebook, seen=set()):
            raise AssertionError(f"{answer.__name__} uses {found}, which this exercise is about; write it yourself")


def is_from(notebook: dict, value: object) -> bool:
    """Whether a function or class was defined by a cell of the notebook."""
    if isinstance(value, FunctionType):
        return value.__globals__ is notebook
    return isinstance(value, type) and value.__module__ == notebook.get("__name__")


def foreign(value: object, notebook: dict, seen: set[int]):
    """Yields, by name, what is not given of the package and used by this function or class or by what it calls."""
    value = unwrap(value) if callable(value) else value
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, ModuleType | FunctionType | type) and not is_from(notebook, value):
        home = value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""
        given = value.__name__ in GIVEN and home not in BUILT
        if home.split(".")[0] == "minildm" and not given:
            yield value.__name__ if isinstance(value, ModuleType) else f"{home}.{value.__name__}"
    elif isinstance(value, type):
        for part in (*value.__bases__, *vars(value).values()):
            yield from foreign(part, notebook, seen)
    elif isinstance(value, FunctionType):
        held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        held += [cell.cell_contents for cell in value.__closure__ or () if cell != type(cell)()]
        for name in names_in(value.__code__):
            if name.startswith("import minildm"):
                yield name.removeprefix("import ")
            held.append(notebook.get(name))
        for part in held:
            yield from foreign(part, notebook, seen)


def names_in(code: CodeType):
    """Yields the global names that the code reads, and "import x" for what it imports, functions inside it included."""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            yield f"import {step.argval}"
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)
