"""An image file as bytes, before it is decoded: which formats are opened, and which parts its pixels do not need."""

import re

try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    HEIF = ("HEIF",)
except ImportError:  # requirements-formats.txt
    HEIF = ()

# All that is ever opened. Pillow knows forty more: some start a program on the file (PostScript: Ghostscript), the
# others are rare and their decoders little tested. A JPEG with further pictures (MPO) is opened as a JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "AVIF", *HEIF)

HEAD_BYTES = 1024
UNSUPPORTED = {  # format -> how its files begin
    "HEIC of a kind" if HEIF else "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "AVIF of a kind": rb".{4}ftypavi",
    "JPEG XL": rb"\xff\x0a|.{4}JXL ",
    "JPEG 2000": rb".{4}jP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "SVG": rb"\s*(<\?xml.*?)?(<!.*?)?<svg\b",
    "a raw photo": rb"II\*\0.{4}CR|II(RO|U\0)|FUJIFILMCCD-RAW|.{4}ftypcrx",
    "TIFF of a kind": rb"II[*+]\0|MM\0[*+]",
}
# Files of weights, as safetensors and torch write them.
WEIGHTS = re.compile(rb'.{4}\0{4}\{"|PK\x03\x04.{26}[^/]{1,255}/(data\.pkl|\.format_version)', re.DOTALL)
ADVICE = "which is not supported here: convert it to PNG, which changes no pixel"

PNG, JPEG, AVIF = (re.compile(start, re.DOTALL) for start in (rb"\x89PNG\r\n\x1a\n", rb"\xff\xd8\xff", rb".{4}ftypavi"))
FRAMING = 0xEE  # a JPEG's APP14, which says how its colours are coded; the other 15 APPs and the comment are metadata
METADATA = {*range(0xE0, 0xF0), 0xFE} - {FRAMING}
START_OF_SCAN = 0xDA
END_OF_SCAN = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # any marker but a restart


def unsupported(head: bytes) -> str:
    """Format and advice, if a file that begins with `head` is of a known format that is not supported; else empty."""
    if WEIGHTS.match(head):
        return "the weights of a model, which go after --weights"
    name = next((name for name, start in UNSUPPORTED.items() if re.match(start, head, re.DOTALL)), "")
    if name == "HEIC":
        return "HEIC, which needs pillow-heif: pip install -r requirements-formats.txt, or convert it to PNG"
    return f"{name}, {ADVICE}".replace("a kind, which", "a kind that") if name else ""


def without_metadata(data: bytes) -> bytes:
    """A PNG, JPEG or AVIF file without the parts that its pixels do not need; other files unchanged."""
    if PNG.match(data):
        kept, place = [data[:8]], 8
        while place < len(data):  # length, name, content, checksum
            end = place + 12 + int.from_bytes(data[place : place + 4])
            name = data[place + 4 : place + 8]
            if name == b"tRNS" or name[:1].isupper():
                kept.append(data[place:end])
            place = end
        return b"".join(kept)
    if JPEG.match(data):
        return b"".join(_split_at_first_scan(data))
    return data.replace(b"Exif", b"none", 1) if AVIF.match(data) else data


def with_longer_scan(data: bytes) -> bytes:
    """A JPEG with more bytes at the end of its first scan, which a decoder skips unless it lacks data there."""
    head, scans = _split_at_first_scan(data)
    end = END_OF_SCAN.search(scans, 2)
    place = end.start() if end else len(scans)
    return head + scans[:place] + bytes(range(10, 250, 5)) + scans[place:]


def _split_at_first_scan(data: bytes) -> tuple[bytes, bytes]:
    """The two parts of a JPEG: what comes before its first scan, without metadata, and the rest."""
    kept, place = [data[:2]], 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data) and data[place + 1] != START_OF_SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if data[place + 1] not in METADATA:
            kept.append(data[place:end])
        place = end
    return b"".join(kept), data[place:]
