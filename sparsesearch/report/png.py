"""Pictures inside the page: PNG files as data URIs."""

import base64
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray


def png(image: UInt8[ndarray, "Y X 3"]) -> bytes:
    """An RGB picture as a PNG file."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in image)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def data_uri(image: UInt8[ndarray, "Y X 3"]) -> str:
    """The picture as the `src` of an img element."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
