"""What the app says, in English and Chinese. Labels and tips of fields are not here: they come from the nodes' schema
and `locales/`, which ComfyUI shows as well."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from nodes.host import ROOT
from nodes.schema import NODES

from . import text_more, text_study, text_workshop

LANGUAGES = {"en": "English", "zh": "中文"}

T: dict[str, tuple[str, str]] = {
    # the frame
    "language": ("Language", "语言"),
    "theme": ("Light or dark", "浅色或深色"),
    "tagline": (
        "CogVideoX with LoRA adapters: stacked, weighted and swapped in milliseconds.",
        "CogVideoX 与 LoRA 适配器：叠加、加权，几毫秒内切换。",
    ),
    "tab_render": ("Render", "生成"),
    "tab_compare": ("Compare", "对比"),
    # render
    "examples": ("Examples", "示例"),
    "shot": ("Size, length and sampling", "尺寸、长度与采样"),
    "start_from": ("Start from a picture or a video", "从图像或视频开始"),
    "base_options": ("How the base is held", "基础模型的放置方式"),
    "size": ("Size", "尺寸"),
    "size_info": ("What the base allows; type another as 720x480.", "基础模型允许的尺寸；也可输入，如 720x480。"),
    "frames_info": ("What the base allows.", "基础模型允许的长度。"),
    "lock": ("Keep the seed", "固定种子"),
    "dice": ("Draw a seed", "随机种子"),
    "image": ("Picture to start from", "起始图像"),
    "video": ("Video to change", "要改动的视频"),
    "render": ("Render", "生成"),
    "stop": ("Stop", "停止"),
    "verify_base": ("Verify the base", "校验基础模型"),
    "add_triggers": ("Add trigger words to the prompt", "把触发词加入提示词"),
    "result_hint": ("Your clip appears here.", "生成的视频会显示在这里。"),
    "result": ("Result", "结果"),
    "record": ("Record", "记录"),
    "gallery": ("Made so far", "已生成"),
    # progress
    "waiting": ("Waiting for its turn…", "排队中…"),
    "crowded": ("Too many are waiting for their turn already; try again in a moment.", "排队的人太多，请稍后再试。"),
    "starting": ("Starting…", "开始…"),
    "step_of": ("step {done} of {total}", "第 {done} 步，共 {total} 步"),
    "decoding": ("decoding", "解码"),
    "left": ("{seconds} left", "剩余 {seconds}"),
    "part_of": ("clip {part} of {parts}", "第 {part} 段，共 {parts} 段"),
    "stopped": ("Stopped.", "已停止。"),
    "done_in": ("{frames} frames in {seconds} s", "{frames} 帧，用时 {seconds} 秒"),
    "swap_in": ("adapters put on in {ms} ms", "适配器切换用时 {ms} 毫秒"),
    "seconds": ("{n} s", "{n} 秒"),
    "minutes": ("{n} min", "{n} 分钟"),
    "defect": (
        "{kind}: {error}. This is a defect in CogLoom, not in what you did.",
        "{kind}：{error}。这是 CogLoom 的缺陷，不是你的操作有误。",
    ),
    # warnings
    "fine": ("Ready. Nothing stands out.", "就绪，没有异常。"),
    "overlap": (
        "{a} and {b} pull the same weights (cosine {cosine}): together they may be too strong.",
        "{a} 与 {b} 改动方向相近（余弦 {cosine}）：叠加可能过强。",
    ),
    "opposed": (
        "{a} and {b} undo one another (cosine {cosine}).",
        "{a} 与 {b} 相互抵消（余弦 {cosine}）。",
    ),
    "effect_line": ("{name}: effect {effect}", "{name}：效果 {effect}"),
    # status
    "no_base": ("no base loaded yet", "尚未加载基础模型"),
    "status_device": ("device", "设备"),
    "status_memory": ("memory", "内存"),
    "status_loads": ("base loads", "加载次数"),
    "status_swap": ("last swap", "上次切换"),
    "status_base": ("base", "基础模型"),
    "status_adapters": ("adapters", "适配器"),
    "no_adapters": ("none", "无"),
    "unverified": ("base not verified yet", "基础模型尚未校验"),
    "verified": ("base verified: all {n} tensors bit-identical", "基础模型已校验：{n} 个张量逐位一致"),
    "not_verified": ("base NOT as in its file: {n} tensors differ", "基础模型与文件不符：{n} 个张量不同"),
    # compare
    "side_a": ("Stack A", "A 组"),
    "side_b": ("Stack B", "B 组"),
    "a_to_b": ("Copy A to B", "把 A 复制到 B"),
    "swap_ab": ("Swap A and B", "交换 A 与 B"),
    "prompts": ("Prompts, one per line", "提示词，每行一个"),
    "seeds": ("Seeds, with commas", "种子，用逗号分隔"),
    "compare": ("Compare", "对比"),
    "compare_hint": (
        "Both stacks, each prompt and each seed: same noise, same settings, one base that is loaded once. Size, length "
        "and sampling are those of the Render tab.",
        "两组适配器，每个提示词与种子：噪声和设置相同，基础模型只加载一次。尺寸、长度与采样沿用“生成”页的设置。",
    ),
    "compared_in": ("comparisons: {n}, made in {seconds} s", "对比 {n} 组，用时 {seconds} 秒"),
    "pair": ("Prompt and seed", "提示词与种子"),
    "player_hint": ("The comparison appears here.", "对比结果会显示在这里。"),
    # the gallery
    "use_settings": ("Use these settings", "使用这些设置"),
    "download": ("Download", "下载"),
    "open": ("Show", "查看"),
    "nothing_yet": ("Nothing made yet.", "还没有生成任何内容。"),
    "not_shown": ("Browsers do not play this format; download it.", "浏览器无法播放此格式，请下载。"),
    "used": ("Settings taken from {name}.", "已采用 {name} 的设置。"),
    "lost_adapters": ("Not found here, and so left out: {names}.", "此处找不到，因此略去：{names}。"),
    "needs_image": ("It started from a picture, which a record does not hold: choose one.",
                    "它以图像开始，而记录中不含图像：请选择一张。"),
    "needs_video": ("It started from a video, which a record does not hold: choose one.",
                    "它以视频开始，而记录中不含视频：请选择一个。"),
}  # fmt: skip


ALL = {**text_more.MORE, **text_study.STUDY, **text_workshop.WORKSHOP, **T}  # with what the other tabs say


def text(key: str, language: str, **values: Any) -> str:
    """A sentence in the language; English for a language that is not known. Values are put in as they are: what shows
    the sentence shows plain text."""
    english, chinese = ALL[key]
    return (chinese if language == "zh" else english).format(**values)


def field_text(node: str, name: str, language: str) -> tuple[str, str]:
    """Label and tip of a node's input."""
    told = _locale(language if language in LANGUAGES else "en").get(node, {}).get("inputs", {}).get(name, {})
    kind = next(one.kind for one in NODES[node].inputs if one.name == name)
    return (told.get("name") or name).replace("_", " ").replace("vae", "VAE"), told.get("tooltip") or kind.tip


def node_title(node: str, language: str) -> str:
    known = NODES.get(node)
    told = _locale(language if language in LANGUAGES else "en").get(node, {}).get("display_name")
    return told or (known.title if known else node)


@functools.cache
def _locale(language: str) -> Mapping[str, Any]:
    try:
        return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # English is in the schema, too
        return {}
