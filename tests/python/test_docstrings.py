"""Every public function of the package tells its options and errors; every public class and method has a docstring."""

import inspect
import re
from collections.abc import Callable

import pytest

import torchgraft

pytestmark = pytest.mark.quick
PUBLIC = {name: getattr(torchgraft, name) for name in torchgraft.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
# Its one argument is an error, and it raises none.
RAISES_NOTHING = {"one_line"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_tells_its_errors_and_options(name: str) -> None:
    function: Callable = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert text, name
    assert ("Raises:" in text) != (name in RAISES_NOTHING)
    if "The arguments are AdapterPool's" in text:
        text += inspect.getdoc(torchgraft.AdapterPool) + inspect.getdoc(torchgraft.AdapterPool.__init__)
    options = [each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]
    assert [option for option in options if not re.search(rf"\b{option}\b", text)] == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_its_methods_have_docstrings(name: str) -> None:
    members = vars(CLASSES[name]).items()
    assert (CLASSES[name].__doc__ or "").strip()
    methods = {key: value for key, value in members if inspect.isfunction(value) and not key.startswith("_")}
    assert [key for key, value in methods.items() if not value.__doc__] == []
