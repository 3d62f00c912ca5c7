"""The reference of the C++ headers: every installed declaration is in it, with a comment."""

import re
import sys

import pytest

from scripts_here import SCRIPTS

sys.path.insert(0, str(SCRIPTS))

import cpp_reference  # noqa: E402

pytestmark = pytest.mark.quick
HEADERS = cpp_reference.installed_headers()


def test_all_headers_are_found() -> None:
    listed = (SCRIPTS.parent / "cmake" / "install.cmake").read_text()
    assert sorted(re.findall(r"[a-z_]+/[a-z_]+\.h\b", listed)) == HEADERS
    assert all((SCRIPTS.parent / header).is_file() for header in HEADERS)


@pytest.mark.parametrize("header", HEADERS)
def test_every_declaration_is_there_and_has_a_comment(header: str) -> None:
    text = (SCRIPTS.parent / header).read_text()
    declarations = cpp_reference.read_header(text).declarations
    assert [each.names for each in declarations if not each.comment] == []
    assert {name for each in declarations for name in each.names} == set(cpp_reference.names_in(text))


EXAMPLE = """\
#pragma once

// Of the whole header.

namespace torchgraft {

// A formula:
//   y = x * [a] <b>
// and `code_in_it`.
TORCHGRAFT_API int first(
    const char* text = "{;");
TORCHGRAFT_API int second();

// Of a class.
class Held {
 public:
  int seen() const { return seen_; }  // a member

 private:
  int seen_ = 0;
};

// With a body.
inline int third(char c) {
  return c == '{' ? 1 : 0;
}

}  // namespace torchgraft
"""


def test_what_is_made_of_a_header() -> None:
    header = cpp_reference.read_header(EXAMPLE)
    assert header.comments == [["Of the whole header."]]
    assert [each.names for each in header.declarations] == [["first", "second"], ["Held"], ["third"]]
    functions, held, third = header.declarations
    assert functions.code == 'int first(\n    const char* text = "{;");\nint second();'
    assert held.code == "class Held {\n public:\n  int seen() const { return seen_; }  // a member\n};"
    assert third.code == "inline int third(char c);"
    assert cpp_reference.prose(functions.comment) == ("A formula:\n\n      y = x * [a] <b>\n\nand `code_in_it`.")
    assert cpp_reference.prose(["a_b <c>"]) == r"a\_b \<c\>"
