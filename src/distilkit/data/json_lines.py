"""Read rows of .jsonl files, and the text of a line that is too long for memory in parts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from distilkit.data.corpus import LONGEST, end_of_piece
from distilkit.data.table_files import open_text

LONG_LINE = 2**24  # characters; longer lines are read in parts of LONGEST
_MOST_ELSE = 2**25  # characters of a long line without its long strings
_STRING = re.compile(r'[^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+', re.DOTALL)  # ends before half an escape

Row = dict[str, Any]


def json_rows(file: Path, *, column: str | None = None) -> Iterator[tuple[int, Row | str]]:
    """Yield the number and the object of each line that is not blank, or what is wrong with the line.

    With ``column``, a line of more than ``LONG_LINE`` characters gives several objects, each with a part of that column.
    """
    with open_text(file) as stream:
        number = 0
        while line := stream.readline(LONG_LINE if column else -1):
            number += 1
            if column and len(line) == LONG_LINE and not line.endswith("\n"):
                for row in _long_row(line, stream, column):
                    yield number, row
            elif line.strip():
                yield number, _json_object(line)


def _long_row(line: str, stream: TextIO, column: str) -> Iterator[Row | str]:
    """Yield objects with the parts of a column, or the object of a line whose column is short; memory is bounded.

    Strings of more than ``LONGEST`` characters are taken out of the line; the rest is parsed as any line.
    """
    rest, string = "", None  # the line without long strings; the string that is being read, or None between two
    is_long = is_text = any_text = False  # of the string; whether the text was one
    text = ""  # what is decoded and not yielded
    while line:
        more = "" if line.endswith("\n") else stream.readline(LONGEST)
        line, begin = line.removesuffix("\n"), 0
        while begin < len(line):
            if string is None:
                end = line.find('"', begin) + 1 or len(line)
                rest += line[begin:end]
                string = "" if line[end - 1] == '"' else None
                begin = end
                continue
            match = _STRING.match(line, begin)
            assert match is not None
            string, begin = string + match[0], match.end()
            if len(string) > LONGEST and not is_long:
                is_long, is_text = True, _last_key(f'{rest}"}}') == column
                any_text = any_text or is_text
            closed = begin < len(line) and line[begin] == '"'
            if not closed and begin < len(line) and (len(line) - begin > 6 or not more):
                yield "is not a JSON object: a string of it holds an escape that there is not; fix or drop that line"
                return
            if is_text:
                try:
                    text = _joined(text, json.loads(f'"{string}"'))
                except json.JSONDecodeError:
                    yield "is not a JSON object: a string of it holds a control character; fix or drop that line"
                    return
                while len(text) > LONGEST + 1 or (closed and text):  # one more, which may be half a character
                    end = end_of_piece(text)
                    yield {column: text[:end]}
                    text = text[end:]
            if is_long:
                string = ""
            if closed:
                rest += f'{string}"'
                string, begin, is_long, is_text = None, begin + 1, False, False
            elif begin < len(line):
                break
        if len(rest) > _MOST_ELSE:
            yield f"holds more than {_MOST_ELSE:,} characters besides long texts; drop that line"
            return
        line = line[begin:] + more if more else ""
    row = _json_object(rest + (string or "")) if rest.strip() else {column: ""}
    if isinstance(row, str) or not any_text:
        yield row


def _last_key(begun: str) -> str | None:
    """Return the key of an object's last value, or None if the text is no object but the beginning of another thing."""
    row = _json_object(begun)
    return None if isinstance(row, str) else next(reversed(row), None)


def _joined(text: str, more: str) -> str:
    """Join two texts, and the halves of a character that two escapes spell, of which the first ends ``text``."""
    if text and more and "\ud800" <= text[-1] < "\udc00" <= more[0] < "\ue000":
        pair = (text[-1] + more[0]).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        return text[:-1] + pair + more[1:]
    return text + more


def _json_object(line: str) -> Row | str:
    begins = line.strip()[:1]
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if begins == "{" and error.pos >= len(line.rstrip()):
            found = "is not a JSON object but the beginning of one"
            return f"{found}; fix or drop that line, or write each object on one line with jq -c ."
        row = [{}] if begins == "[" and error.pos >= len(line.rstrip()) else None  # it goes on in the next line
    except (ValueError, RecursionError):
        return "holds a number of too many digits, or lists too deep in each other, for Python; drop that line"
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return "is not a JSON object but of a JSON array; write each object on one line, for example with jq -c '.[]'"
    return row if isinstance(row, dict) else "is not a JSON object; fix or drop that line"
