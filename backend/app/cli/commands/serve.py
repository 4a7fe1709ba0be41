"""`gpt2 serve`：OpenAI 相容的 HTTP 服务。"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage, parse_options
from app.cli.shared.trained import Device, IdleThreads
from app.common.tell import to_stderr
from app.common.units import size
from app.common.waiting import settle_waiting
from app.models.transformer.cache.kv_dtype import KVDtype

if TYPE_CHECKING:
    from app.cli.shared.trained import Trained
    from app.data.tokenizers import Tokenizer
    from app.models.transformer import GPT2Model
    from app.serving.api.template import Jinja, Own
    from app.serving.served import Served

SUMMARY = "serve trained models over HTTP, for OpenAI clients, lm-eval and curl"
EXAMPLES = """\
  gpt2 serve runs/mine                          # http://127.0.0.1:8080
  gpt2 serve models/gpt2 runs/mine --port 9000 --api-key-file key --kv-memory 2GiB
  gpt2 serve runs/mine --speculate ngram --rows 16
  gpt2 serve runs/mine --batch-invariant        # same request, same bits
  gpt2 serve runs/mine --host 0.0.0.0 --api-key-file keys --allow-host my.name"""

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Args:
    """服务的全部选项。"""

    models: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        Doc("run folders, RUN/best, checkpoints or saved models; served by their last name"),
    ]
    host: Annotated[str, Doc("address to listen on; others than loopback need keys")] = "127.0.0.1"
    port: Annotated[int, Doc("0 = any free one")] = 8080
    api_key_file: Annotated[
        Path | None, Doc("one key a line; every route but /health asks for one")
    ] = None
    allow_host: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        Doc("a name that the Host header may hold, besides loopback; repeat for more"),
    ] = ()
    rows: Annotated[
        int | None, Doc("texts written at once, 1 to 64; None = 8, or what fits --kv-memory")
    ] = None
    kv_memory: Annotated[
        str | None,
        Doc("memory for keys and values, such as 2GiB; None = a quarter of what is free"),
    ] = None
    kv_dtype: Annotated[KVDtype, Doc("int8 = a quarter of the memory, rounded")] = None
    speculate: Annotated[
        str, Doc("ngram = guess from earlier text, where that pays; the text is the same; or off")
    ] = "off"
    draft: Annotated[
        str | None,
        Doc("a small model with the same tokenizer that guesses, where that pays; same text"),
    ] = None
    batch_invariant: Annotated[
        bool,
        Doc("same request, same bits, whatever else runs (float32 keys, dense models, on CPUs)"),
    ] = False
    max_stall: Annotated[
        float, Doc("seconds that reading a prompt may hold up the texts being written")
    ] = 0.2
    queue: Annotated[int, Doc("requests that may wait; more get 429")] = 64
    timeout: Annotated[float, Doc("seconds for a whole request")] = 300.0
    inspect: Annotated[
        bool,
        Doc("answer /v1/inspect and /v1/history; where neither is given: only on loopback"),
    ] = True
    chat_template: Annotated[
        Path | None,
        Doc("Jinja file for /v1/chat/completions; None = what it was tuned with, if any"),
    ] = None
    waiting: IdleThreads = "auto"
    device: Device = "auto"


def parse(argv: Sequence[str]) -> Args:
    """没有说 inspect 时：只有本机连得到才许看里面。"""
    args = parse_options(Args, argv, Usage("serve", SUMMARY, EXAMPLES))
    flags = {word.split("=")[0].replace("_", "-") for word in argv}
    if flags & {"--inspect", "--no-inspect"}:
        return args
    return dataclasses.replace(args, inspect=_loopback(args.host))


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 选项不对，或模型不能供人用。
        ImportError: 没有装 fastapi 与 uvicorn。
    """
    _check(args)
    settle_waiting(args.waiting, serving=True)
    try:
        from app.serving.api.app import Address, Service
        from app.serving.api.hub import Timeouts
    except ImportError as error:
        raise ImportError(
            f"gpt2 serve needs fastapi and uvicorn ({error}): pip install 'gpt2-workbench[serve]'"
        ) from None
    keys = () if args.api_key_file is None else read_keys(args.api_key_file)
    # 先占住端口：占不到的话，不必等大模型装完才知道。
    with _bound(args.host, args.port) as door:
        served, port = _load(args), door.getsockname()[1]
        limits = Timeouts(whole=args.timeout)
        address = Address(args.host, port, args.allow_host, keys, limits, args.inspect)
        server = Service(served, address).server()
        host = f"[{args.host}]" if ":" in args.host else args.host
        to_stderr(f"serving on http://{host}:{port} ({len(keys) or 'no'} API keys)")
        to_stderr(f"look inside in a browser: http://{host}:{port}/")
        server.run([door])
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """
    Raises:
        OSError: 端口有人在用，或没有这个地址。
    """
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except OSError as error:
        door.close()
        raise OSError(
            f"cannot listen on host={host} port={port}: {error.strerror or error}; use another "
            "--port (0 = any free one) or --host"
        ) from None
    return door


def _check(args: Args) -> None:
    if not args.models:
        raise ValueError("no model: give a run folder, a checkpoint or a saved model")
    if args.speculate not in ("off", "ngram"):
        raise ValueError(f"speculate={args.speculate!r} must be 'off' or 'ngram'")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"port={args.port} must be between 0 and 65535")
    if args.draft is not None and args.speculate != "off":
        raise ValueError(f"speculate={args.speculate!r} and draft={args.draft!r}: give one of them")
    for name in ("max_stall", "timeout", "queue"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} must be more than 0")
    if not _loopback(args.host) and args.api_key_file is None:
        raise ValueError(
            f"host={args.host!r} is open to others: give --api-key-file, or listen on 127.0.0.1"
        )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> tuple[str, ...]:
    """
    Raises:
        ValueError: 没有钥匙，太短，或不是可见的 ASCII（HTTP 头里写不出别的）。
    """
    keys = tuple(filter(None, (line.strip() for line in path.read_text("utf-8").splitlines())))
    if not keys:
        raise ValueError(f"{path} holds no key: write one per line")
    for number, key in enumerate(keys, start=1):
        if not re.fullmatch(r"[\x21-\x7e]{16,256}", key):
            raise ValueError(
                f"{path}: key {number} must have 16 to 256 visible ASCII characters and no spaces"
            )
    return keys


def parse_size(text: str) -> int:
    """
    Raises:
        ValueError: 不是字节数。
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]iB)?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"kv_memory={text!r} must be bytes, or a number with KiB, MiB or GiB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def serving_names(models: tuple[str, ...]) -> list[str]:
    """
    Raises:
        ValueError: 两个模型同名。
    """
    names = [Path(model).resolve().name for model in models]
    for name, model in zip(names, models, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"two models would be called {name!r}, one of them {model}: rename or link a folder"
            )
    return names


def _load(args: Args) -> list[Served]:
    from app.cli.shared.trained import load_trained

    names = serving_names(args.models)
    trained = [load_trained(model, args.device) for model in args.models]
    memory = _memory(args, trained[0]) // len(trained)
    served = [_serve(args, name, one, memory) for name, one in zip(names, trained, strict=True)]
    for one in served:
        cache = one.engine.flat.cache
        to_stderr(
            f"{one.name}: {cache.rows} rows of {one.context} tokens, {size(cache.nbytes)} of keys "
            f"and values; a token takes {one.engine.costs.seconds(1) * 1000:.1f} ms"
            + (", batch-invariant" if args.batch_invariant else "")
        )
    return served


def _memory(args: Args, trained: Trained) -> int:
    from app.planning.available_memory import available_memory

    if args.kv_memory is not None:
        return parse_size(args.kv_memory)
    free, source = available_memory(trained.model.device)
    return 2**31 if free is None else free // 4


def _serve(args: Args, name: str, trained: Trained, memory: int) -> Served:
    from app.serving.engine import Limits
    from app.serving.schedule import Pace
    from app.serving.served import DEFAULT_ROWS, rows_for, serve_model
    from app.training.saving.checkpoint import step_of

    model = trained.model
    fits = rows_for(model.config, memory, args.kv_dtype, model.embed.wte.weight.dtype)
    rows = args.rows
    if rows is None:
        rows = min(DEFAULT_ROWS, fits) if args.kv_memory is None else fits
    elif rows > fits:
        raise ValueError(
            f"rows={rows} of {name} need more than {size(memory)} of keys and values: "
            f"at most {fits} fit; use --rows {fits}, a larger --kv-memory or --kv-dtype int8"
        )
    limits = Limits(queue=args.queue, pace=Pace(max_stall=args.max_stall))
    template = _chat_form(args, trained.folder, trained.tokenizer)
    served = serve_model(
        name, model, trained.tokenizer, rows=rows, kv_dtype=args.kv_dtype, limits=limits,
        guess=_guess(args, trained), batch_invariant=args.batch_invariant,
    )  # fmt: skip
    # 检查点的上一层就是那次训练；别的文件夹不属于哪次训练。
    in_run = step_of(trained.folder) is not None
    run = trained.folder.parent if in_run else None
    return dataclasses.replace(served, template=template, run=run)


def _chat_form(args: Args, folder: Path, tokenizer: Tokenizer) -> Jinja | Own | None:
    """--chat-template；否则训练时的 chat.json；否则文件夹里的 Jinja。

    Raises:
        ValueError: chat.json 要的特殊词元，分词器没有；或 Jinja 读不懂。
    """
    from app.data.chat.template import find_template
    from app.serving.api.template import Jinja, Own

    own, path = find_template(folder), args.chat_template or folder / _TEMPLATE
    if args.chat_template is None and own is not None:
        own.check(tokenizer)
        return Own(own)
    return Jinja(path.read_text("utf-8")) if args.chat_template or path.is_file() else None


def _guess(args: Args, trained: Trained) -> Literal["off", "ngram"] | GPT2Model:
    from app.cli.shared.trained import load_trained

    if args.draft is None:
        return "ngram" if args.speculate == "ngram" else "off"
    small = load_trained(args.draft, args.device)
    if small.tokenizer.fingerprint() != trained.tokenizer.fingerprint():
        raise ValueError(
            f"the draft model {args.draft} has another tokenizer than {trained.folder}: "
            "give one trained on the same tokens"
        )
    return small.model
