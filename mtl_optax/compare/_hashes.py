"""Hashes of what numbers depend on: arrays, traced programs, Python functions.

They are the same in every process: nothing of an address or of the order of a set is in them.
"""

import collections
import contextlib
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

PLAIN = (type(None), bool, int, float, complex, str, bytes)
INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


def of_values(tree: Any) -> str:
    """A hash of a tree: of its arrays by their bytes, and of whatever else is in it."""
    walk = _Walk()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        walk.text(_lasting(jax.tree_util.keystr(path)))
        walk.value(leaf)
    return walk.digest()


def of_function(function: Callable[..., Any]) -> str:
    """A hash of Python that can't be traced: its code, and the values that it reaches."""
    walk = _Walk()
    walk.value(function)
    return walk.digest()


def of_program(function: Callable[..., Any], *args: Any) -> str:
    """A hash of what `function` does once it is traced, with the arrays that it closes over."""
    jaxpr = jax.make_jaxpr(function)(*args)
    walk = _Walk()
    walk.text(_lasting(str(jaxpr)))
    walk.constants(jaxpr)
    return walk.digest()


class _Walk:
    """Everything that can be reached from a value, each once."""

    def __init__(self, seen: Mapping[int, tuple[int, Any]] | None = None):
        self._found = hashlib.sha256(usedforsecurity=False)
        # By id; they are held, so that no other object gets the id of one that is gone.
        self._seen: dict[int, tuple[int, Any]] = {**(seen or {})}

    def digest(self) -> str:
        return self._found.hexdigest()

    def text(self, *parts: str) -> None:
        for part in parts:
            content = part.encode(errors="surrogatepass")
            self._found.update(f"{len(content)}:".encode() + content)

    def value(self, value: Any) -> None:
        """Plain values, arrays, containers, functions and objects of the user's own classes.

        Of what a library made, whose insides may be of one process, the type's name alone.
        """
        self.text(type(value).__qualname__)
        if isinstance(value, PLAIN):
            self.text(repr(value))
        elif hasattr(value, "__array__") and not isinstance(value, type):
            self._array(value)
        elif self._is_new(value):
            for part in self._parts(value):
                self.value(part)

    def constants(self, program: Any) -> None:
        """The values in a jaxpr, which its text leaves out or shortens."""
        if not self._is_new(program):
            return
        if isinstance(program, jex.ClosedJaxpr):
            self._several(program.consts)
            program = program.jaxpr
        for eqn in program.eqns:
            self._several(v.val for v in eqn.invars if isinstance(v, jex.Literal))
            self._parameter(eqn.params)
        self._several(v.val for v in program.outvars if isinstance(v, jex.Literal))

    def _parameter(self, value: Any) -> None:
        if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr):
            self.constants(value)
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                self._parameter(value[name])
        elif isinstance(value, tuple | list):
            for part in value:
                self._parameter(part)
        elif hasattr(value, "__array__"):
            self._array(value)
        elif hasattr(value, "callback_func"):  # Python that the program calls when it runs
            self.value(value.callback_func)

    def _several(self, values: Any) -> None:
        for value in values:
            self.value(value)

    def _array(self, value: Any) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        self.text(str(array.dtype), str(array.shape))
        if not array.dtype.hasobject:
            self._found.update(np.ascontiguousarray(array).tobytes())
        elif self._is_new(value):  # addresses are all that its bytes hold
            self._several(array.ravel().tolist())

    def _is_new(self, value: Any) -> bool:
        known = self._seen.get(id(value))
        if known:
            self.text("again", str(known[0]))
            return False
        self._seen[id(value)] = len(self._seen), value
        return True

    def _parts(self, value: Any) -> Iterator[Any]:
        """What a value consists of; a name stands for what is not looked into."""
        if isinstance(value, Mapping):
            yield from (part for item in value.items() for part in item)
        elif isinstance(value, tuple | list | collections.deque):
            yield from value
        elif isinstance(value, set | frozenset):
            yield from sorted(map(self._alone, value))
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, functools.cached_property | functools.partialmethod):
            yield value.func
        elif isinstance(value, np.vectorize):
            yield value.pyfunc
        elif isinstance(value, types.SimpleNamespace):
            yield vars(value)
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            yield from _of_function(value)
        elif isinstance(value, types.CodeType):
            yield from _of_code(value)
        elif isinstance(value, property | staticmethod | classmethod):
            yield from (getattr(value, name, None) for name in ("fget", "__func__"))
        elif isinstance(value, types.ModuleType):
            yield _name(value)
        elif hasattr(value, "__wrapped__"):  # jax.jit, functools.cache
            yield value.__wrapped__
        elif isinstance(value, type):
            yield from _of_class(value)
        elif _is_own(type(value)):
            yield from (type(value), object.__getstate__(value))  # its dict and slots
        else:
            yield _name(value)
            with contextlib.suppress(Exception):  # whatever a library's class says to it
                yield _lasting(repr(value))  # ranges, fractions, dates, patterns, models' options

    def _alone(self, value: Any) -> str:
        """A hash of one of several that have no order."""
        if isinstance(value, PLAIN):
            return repr(value)
        walk = _Walk(self._seen)
        walk.value(value)
        return walk.digest()


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (_name(function), function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            yield None
    if not _is_own(function):
        return
    yield function.__code__
    names = sorted(_names(function.__code__))
    seen: set[str] = set()
    for name in names:
        if name in function.__globals__:
            yield function.__globals__[name]
            yield from _of_module(function.__globals__[name], names, seen)
        # Or a module that the function imports itself.
        yield from _of_module(sys.modules.get(name), names, seen)


def _of_module(value: Any, names: list[str], seen: set[str]) -> Iterator[Any]:
    """What code may reach by names in a module of the user's, and in those inside it."""
    if not (isinstance(value, types.ModuleType) and _is_own(value)) or value.__name__ in seen:
        return
    seen.add(value.__name__)
    for name in names:
        if hasattr(value, name):
            part = getattr(value, name)
            yield part
            yield from _of_module(part, names, seen)


def _of_code(code: types.CodeType) -> Iterator[Any]:
    """What code does: not its text, which two lambdas of a line share and a comment changes."""
    named = code.co_varnames, code.co_freevars, code.co_names
    yield from (code.co_code, code.co_exceptiontable, code.co_flags, named, code.co_consts)


def _of_class(cls: type) -> Iterator[Any]:
    yield _name(cls)
    if _is_own(cls):
        yield from cls.__bases__
        for name, member in vars(cls).items():
            if callable(member) or not name.startswith("__"):
                yield from (name, member)


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in code, and in the functions that it defines.

    Texts too, which `getattr` takes.
    """
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    texts = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return {*code.co_names, *texts}.union(*map(_names, inner))


def _name(value: Any) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    called = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{type(value).__qualname__} {getattr(value, '__module__', '')}.{called}"


def _is_own(thing: Any) -> bool:
    """Whether a function, class or module is the user's, neither Python's nor a package's."""
    module = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    package = str(module).partition(".")[0]
    # The code of this library is hashed as a whole.
    if package in sys.stdlib_module_names or package == "mtl_optax":
        return False
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return not (file and INSTALLED & {*Path(file).parents})


def _lasting(text: str) -> str:
    """A text without what differs from process to process: addresses, and the order of sets."""
    text = re.sub(r"0x[0-9a-f]+", "", text)
    return re.sub(
        r"frozenset\(\{([^{}]*)\}\)", lambda found: str(sorted(found[1].split(", "))), text
    )
