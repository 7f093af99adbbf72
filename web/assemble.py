"""Translate multiply.wat into multiply.wasm: python -m web.assemble (needs wasmtime: requirements-web.txt)."""

from pathlib import Path

from wasmtime import wat2wasm

SOURCE = Path(__file__).with_name("multiply.wat")

if __name__ == "__main__":
    SOURCE.with_suffix(".wasm").write_bytes(wat2wasm(SOURCE.read_text(encoding="utf-8")))
