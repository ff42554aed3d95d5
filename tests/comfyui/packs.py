"""Packs of a few lines, written into a server's custom_nodes: what other people's nodes would hand to ours."""

from __future__ import annotations

from pathlib import Path

EXCHANGE = '''
"""A LORA_STACK from nowhere, one that is looked at, and a conditioning of any shape."""

import json

import torch


class Emit:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"entries": ("STRING", {"default": "[]"})}}

    RETURN_TYPES = ("LORA_STACK",)
    FUNCTION = "run"

    def run(self, entries):
        return ([tuple(entry) for entry in json.loads(entries)],)


class Look:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"lora_stack": ("LORA_STACK",)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, lora_stack):
        kinds = [type(entry).__name__ for entry in lora_stack]
        return {"ui": {"text": [json.dumps({"type": type(lora_stack).__name__, "kinds": kinds,
                                            "entries": [list(entry) for entry in lora_stack]})]}}


class Encoding:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokens": ("INT", {"default": 24}), "width": ("INT", {"default": 64})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    def run(self, tokens, width):
        return ([[torch.zeros(1, tokens, width), {}]],)


class Text:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, text):
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {"ExchangeEmit": Emit, "ExchangeLook": Look, "ExchangeEncoding": Encoding, "ExchangeText": Text}
'''


def put_exchange(base: Path) -> None:
    folder = base / "custom_nodes" / "exchange"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(EXCHANGE, encoding="utf-8")
