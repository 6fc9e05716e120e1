"""support.io: moved here; to be rewritten."""

from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape
import csv
import io
import json
import os
import pickle
import re
import zipfile

from safetensors import SafetensorError

from support.cli import UserError



def write_json(path, content, indent=2):
    write_whole(path, lambda tmp: tmp.write_text(json.dumps(content, indent=indent)))



def write_whole(path, write):
    """Call write(temporary path beside `path`), bring it to the disk, then rename: a reader finds the old file or the new, never a part."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: this folder cannot be made ({error.strerror}); choose another --out") from None
    try:
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError, RuntimeError) as error:               # torch.save and safetensors wrap a full disk in their own
        raise UserError(f"{path}: could not be written ({error}); free some space or choose another --out. What was there is untouched") from None
    finally:
        tmp.unlink(missing_ok=True)



@contextmanager
def reading(path, hint="get the file again"):
    """Whatever goes wrong inside, while a file is read, parsed or mapped, becomes one line: which file, what is wrong, what to do."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); {hint}") from None
    except Exception as error:
        what = str(error).strip().splitlines()
        raise UserError(f"{path}: damaged or of another kind ({type(error).__name__}: {what[0] if what else ''}); {hint}") from None


def read_json(path, missing=None):
    """The JSON object in a file; `missing` instead where there is no such file, if that is given."""
    path = Path(path)
    if missing is not None and not path.exists():
        return missing
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, not a JSON object; copy it anew")
    return found


def read_any(path):
    """JSON, JSON lines, TSV or XLSX, told apart by content -> (a list or dict, name): name(k) says in a message where record k stands."""
    path = Path(path)
    with reading(path):
        raw = path.read_bytes()
        if raw.startswith(b"PK\x03\x04") or path.suffix == ".tsv":
            numbered = read_xlsx(path) if raw.startswith(b"PK") else read_tsv(raw.decode("utf-8-sig"), path)
            return [row for _, row in numbered], lambda k: f"{path}, row {numbered[k][0]}"
        text = raw.decode("utf-8-sig")
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]     # blank lines count, and hold nothing
        if not numbered:
            raise UserError(f"{path}: is empty; get the file again")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = json_lines(numbered, path)
            if not found:
                raise
            return found, lambda k: f"{path}, line {numbered[k][0]}"
    if isinstance(found, dict) and (path.suffix == ".jsonl" or {"question_id", "questionId", "id", "pid"} & found.keys()):
        return [found], lambda k: f"{path}, line {numbered[k][0]}"          # one record per line, and only one line
    return found, lambda k: f"{path}, record {k!r}"



def json_lines(numbered, path):
    """Records of the numbered lines; [] where the file never was one record per line."""
    rows = []
    for i, line in numbered:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not rows or numbered[0][1].lstrip()[0] == "[":
                return []
            raise UserError(f"{path}, line {i}: not valid JSON ({error}); expected one record per line") from None
    return rows if all(isinstance(row, dict) for row in rows) else []



def read_tsv(text, path):
    """-> [(number, {column: cell}), ...]; row 1 is the one below the names."""
    csv.field_size_limit(2**31 - 1)                                         # a cell may hold a whole picture in base64
    with reading(path):
        head, *rows = [*csv.reader(io.StringIO(text, newline=""), delimiter="\t")] or [[]]
    for i, row in enumerate(rows, 1):
        if row and len(row) != len(head):
            raise UserError(f"{path}, row {i}: {len(row)} cells under {len(head)} column names; get the file again")
    if not any(rows):
        raise UserError(f"{path}: {'holds no row' if head else 'is empty'}; get the file again")
    return [(i, dict(zip(head, row))) for i, row in enumerate(rows, 1) if row]



OFFICE, PACKAGE = "http://schemas.openxmlformats.org/officeDocument/2006", "http://schemas.openxmlformats.org/package/2006"
SHEET, KIND = "http://schemas.openxmlformats.org/spreadsheetml/2006/main", "application/vnd.openxmlformats-officedocument.spreadsheetml"



def read_xlsx(path):
    """The first sheet as [(number, {column: cell}), ...], named by its first row: a zip of XML, cells inline or in a table of strings."""
    space, shared, rows = {"": SHEET}, [], []
    words = lambda node: "".join(t.text or "" for t in node.iter(f"{{{SHEET}}}t"))
    with (reading(path),
          zipfile.ZipFile(path) as box):
        if "xl/sharedStrings.xml" in box.namelist():
            shared = [words(si) for si in ElementTree.fromstring(box.read("xl/sharedStrings.xml")).findall("si", space)]
        for row in ElementTree.fromstring(box.read("xl/worksheets/sheet1.xml")).findall("sheetData/row", space):
            rows.append({})
            for cell in row.findall("c", space):
                value = words(cell) if cell.get("t") == "inlineStr" else cell.findtext("v", "", space)
                rows[-1][re.sub(r"\d", "", cell.get("r", ""))] = shared[int(value)] if cell.get("t") == "s" else value
    head, *rows = rows or [{}]
    return [(i, {name: row.get(column, "") for column, name in head.items()}) for i, row in enumerate(rows, 1)]



def write_xlsx(rows, numeric=()):
    """[{column: text}] -> the bytes of a workbook with one sheet, the same for the same rows; the columns `numeric` hold numbers."""
    names = list(rows[0])
    column = lambda i: (chr(64 + i // 26) if i >= 26 else "") + chr(65 + i % 26)
    legal = lambda text: escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f]", "", str(text)))

    def cell(r, i, name, value):
        if name in numeric and r > 1:
            return f'<c r="{column(i)}{r}"><v>{value}</v></c>'
        return f'<c r="{column(i)}{r}" t="inlineStr"><is><t xml:space="preserve">{legal(value)}</t></is></c>'
    sheet = "".join(f'<row r="{r}">' + "".join(cell(r, i, name, row[name]) for i, name in enumerate(names)) + "</row>"
                    for r, row in enumerate([dict(zip(names, names)), *rows], 1))
    related = lambda kind, file: (f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" Type="{OFFICE}/relationships/{kind}" '
                                  f'Target="{file}"/></Relationships>')
    files = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
                               '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
                               '<Default Extension="xml" ContentType="application/xml"/>'
                               f'<Override PartName="/xl/workbook.xml" ContentType="{KIND}.sheet.main+xml"/>'
                               f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{KIND}.worksheet+xml"/></Types>',
        "_rels/.rels": related("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{SHEET}" xmlns:r="{OFFICE}/relationships">'
                           '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": related("worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEET}"><sheetData>{sheet}</sheetData></worksheet>'}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as box:
        for name, text in files.items():
            box.writestr(zipfile.ZipInfo(name), '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n' + text, zipfile.ZIP_DEFLATED)
    return raw.getvalue()



class PlainUnpickler(pickle.Unpickler):
    """REFER's annotations are lists, dicts, strings and numbers, for which a pickle need not name any class: one that does is refused,
    because to load it would be to run it."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}; only plain lists, dicts, strings and numbers are read")



def read_pickle(path):
    with reading(path), open(path, "rb") as file:      # a broken one may raise anything
        try:
            return PlainUnpickler(file, encoding="ASCII").load()
        except UnicodeDecodeError:                                          # written by Python 2, whose strings were bytes
            file.seek(0)
            return PlainUnpickler(file, encoding="latin1").load()



def entries(path, key=None):
    """(where, key, row) of each record of a file; `key`: the list lies under this name of a JSON object."""
    found, name = read_any(path)
    if key is not None:
        if not isinstance(found, dict) or not isinstance(found.get(key), (list, dict)):
            raise UserError(f'{path}: no list "{key}" in it; it does not look like the official file')
        found = found[key]
    if not isinstance(found, (list, dict)):
        raise UserError(f"{path}: a {type(found).__name__}, neither a list nor an object of records")
    for k, row in found.items() if isinstance(found, dict) else enumerate(found):
        if not isinstance(row, dict):
            raise UserError(f"{name(k)}: {str(row)[:60]!r} is not a record")
        yield name(k), k, row



def need(where, row, **kinds):
    """Values of the named fields, each of its type; what is missing or of another type is an error that names file and record."""
    values = []
    for name, kind in kinds.items():
        kind = kind if isinstance(kind, tuple) else (kind,)
        value = row.get(name)
        if name not in row and type(None) not in kind:
            raise UserError(f'{where}: no field "{name}"')
        if not isinstance(value, kind) or isinstance(value, bool) and bool not in kind:
            raise UserError(f'{where}: "{name}" is {str(value)[:60]!r}; expected {" or ".join(k.__name__ for k in kind)}')
        values.append(value)
    return values[0] if len(values) == 1 else values
