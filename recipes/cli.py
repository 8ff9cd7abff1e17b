"""The nepa command: nepa TASK RECIPE-or-RUN [key=value ...]."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn


class Task(NamedTuple):
    """A subcommand: the module that has `Options` and `main`, and its line in the help."""

    module: str
    takes: str
    gives: str


_FILES = {"import": "import_released", "export": "export_released"}  # else that of the task's name

TASKS = {
    name: Task(f"recipes.tasks.{_FILES.get(name, name)}", takes, gives)
    for name, (takes, gives) in {
        "check": ("RECIPE or RUN", "is an adapter of your own sound? what is wrong, in plain words"),
        "pretrain": ("RECIPE", "a run folder and the verdict: was anything learned?"),
        "probe": ("RUN", "accuracy of every layer, beside random weights and the raw tokens"),
        "finetune": ("RUN or RECIPE", "accuracy after training on labels, from init= or random weights"),
        "segment": ("RECIPE", "mIoU after training on pixel labels, from init= or random weights"),
        "forecast": ("RUN", "the next steps of a series, beside linear models and persistence"),
        "evaluate": ("RUN", "held-out figures of a fine-tuned, imported or segmentation run"),
        "inspect": ("RUN", "attention and similarity maps and the layers in colour, as one page"),
        "embed": ("RUN", "features of any layer for many samples, as parquet, npy or safetensors"),
        "generate": ("RUN", "samples, completions, and a card: how good are they, beside what costs nothing?"),
        "orders": ("RECIPE", "which patch order? accuracies, tests and pictures, as one page"),
        "objectives": ("RECIPE", "does pre-training pay, and with which objective? as one page"),
        "transfer": ("RECIPE", "which kind of data helps which? each alone against all in one predictor"),
        "ablate": ("RECIPE", "the paper's ablations as one table and one plot"),
        "import": ("DIR or HUB-NAME", "a run of a released checkpoint: a folder or a hub name"),
        "export": ("RUN", "the released Hugging Face layout, or format=onnx, torch"),
        "push": ("RUN OWNER/NAME", "a run on the Hugging Face hub, with a model card; dry_run=true"),
        "resize": ("RECIPE", "the recipe's images once more, small, in shards or an array that load faster"),
        "plan": ("RECIPE", "memory, hours, energy and cost of a training run, before it is paid for"),
        "bench": ("RECIPE", "tokens/s, share of peak, memory, and where the time of a step goes"),
    }.items()
}

PART = "data.part"
"""The key that part=NAME is short for, in every task."""

RUNS = "[DIR] or RUN RUN ..."
SECOND = {"push": "to"}
"""Task -> the option that a second word without a = is."""

HELP = """usage: nepa TASK RECIPE-or-RUN [key=value ...]

Next-embedding prediction on any data, with an honest verdict on what was learned.

{tasks}

A RECIPE is module:function, such as recipes.vision:digits or one of your own; a RUN is the folder that a task
wrote. Every key of the recipe can be set: optim.lr=1e-3 train.length.epochs=20 data.root=DIR.

  nepa pretrain recipes.vision:digits         train on the embedded digits, about half a minute
  nepa probe runs/digits                      read out every layer of that run
  nepa pretrain recipes.vision:digits --help  every key of the recipe with its value
  nepa TASK --help                            what a task takes and gives
  nepa pretrain RECIPE --print-config         the same keys as a file; `nepa pretrain my.yaml` reads one
  nepa --version                              which version this is

Of data of several parts, part=NAME reads the samples of one part alone, in every task.

With -q there is no progress on the screen, only the result and what went wrong.

A run that names code (an adapter, an order, a hook) and was not made here by you is refused unless you add trust=true.
"""


WRITE_NOTHING = {"check", "completion", "plan", "recipes", "runs"}
"""Tasks of which nothing stays."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for something the user can fix, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder may be called by bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(words)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        kept = "finished parts are kept, and the same command goes on from there"
        return _fail("stopped" if words[:1] and words[0] in WRITE_NOTHING else f"stopped; {kept}", 130)
    except Exception as error:
        from nepa_core.basics import UserError
        from nepa_core.runtime.fit import Interrupted

        if isinstance(error, Interrupted):
            return _fail(str(error), error.status)
        if isinstance(error, UserError):
            return _fail(" ".join(str(error).split()), 2)
        if (line := _in_one_line(error, words)) is not None:
            return _fail(" ".join(line.split()), 2)
        raise


def _in_one_line(error: Exception, words: list[str]) -> str | None:
    """What the system says of a command that is too large for it or names what it can't open; None for a defect."""
    import torch

    from nepa_core.runtime.data import KILLED, LOADER_DIED

    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        from nepa_core.runtime.checkpoint import shortened

        return f"{shortened(error.filename)}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, RuntimeError) and "home directory" in text:
        named = next((word for word in words if "~" in word), "~")
        return f"{named[:80]}: there is no such user; give the path without ~"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "not enough mem" in text:
        return f"out of memory{_largest(words)}: lower train.micro_batch or train.batch, or the sizes of model."
    if KILLED in text:
        return LOADER_DIED
    if isinstance(error, RecursionError):
        return f"something is nested too deeply to be followed{_largest(words)}"
    if isinstance(error, OverflowError) or "verflow" in text:
        return f"a number is too large or too small to compute with{_largest(words)}: {text.splitlines()[0][:120]}"
    if type(error).__name__ == "LinAlgError":
        return "training has diverged, as a matrix holds NaN or infinity: lower optim.lr or model.layer_scale"
    return None


def _largest(words: list[str]) -> str:
    """ " (model.dim=1000000000)": the largest number that was given, which is the likely cause."""
    import re

    found = {word: re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", word.partition("=")[2]) for word in words}
    sizes = {word: max((abs(float(number)) for number in numbers), default=0.0) for word, numbers in found.items()}
    word = max(sizes, key=lambda each: sizes[each], default="")
    return f" ({word[:80]})" if word and sizes[word] >= 1000 else ""


def _dispatch(words: list[str]) -> int:
    asks_help = any(word in ("-h", "--help") for word in words)
    quiet, prints_config = "-q" in words, "--print-config" in words
    words = [word for word in words if word not in ("-h", "--help", "-q", "--print-config")]
    if not words or words == ["help"]:
        print(_help())
        return 0
    if words == ["--version"]:
        print(f"nepa {_version()}")
        return 0
    name, *rest = words
    if name == "recipes":
        print(list_recipes())
        return 0
    if name == "completion":
        return _print_completion(rest)
    if name == "runs":
        return _runs(rest, asks_help)
    if name not in TASKS:
        from nepa_core.runtime.config import nearest

        return _fail(f"there is no task {name!r}{nearest(name, [*TASKS, 'recipes', 'runs', 'completion'])}", 2)
    task = importlib.import_module(TASKS[name].module)
    rest = _trusting(rest)
    if name in SECOND and len(rest) > 1 and "=" not in rest[1]:
        rest[1] = f"{SECOND[name]}={rest[1]}"
    if asks_help and (not rest or "=" in rest[0]):
        print(_task_help(name, task, None, {}))
        return 0
    if not rest or ("=" in rest[0] and not os.path.exists(rest[0])):
        return _fail(f"nepa {name} needs a {TASKS[name].takes} after it; see nepa {name} --help", 2)
    from nepa_core.runtime.meter import kept_quiet

    with kept_quiet(quiet), _target(rest) as (target, given):
        options, changes = _split(task.Options, given)
        if asks_help:
            print(_task_help(name, task, target, changes))
        elif prints_config:
            from recipes.config_files import as_text

            own = {key: value for key, value in given.items() if key in task.Options.model_fields}
            print(as_text(target, own | _settable(task, target, changes)), end="")
        else:
            task.main(target, options, changes)
    return 0


@contextmanager
def _target(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe or run and the keys that a command gives, itself or by a config file; errors name its lines."""
    from nepa_core.runtime import trust
    from nepa_core.runtime.config import parse_assignments

    target, given = words[0], parse_assignments(words[1:])
    trust.typed(trust.addresses_in(given))
    if not target.endswith((".yaml", ".yml")):
        yield target, given
        return
    from recipes.config_files import naming_lines, read_config_file

    file = read_config_file(Path(target))
    with naming_lines(file, given):
        yield file.target, file.values | given


def _trusting(words: list[str]) -> list[str]:
    """Take `trust=` out of the words of a command, and the current folder off the places of modules if it is a run."""
    from nepa_core.basics import UserError
    from nepa_core.runtime import trust

    said = [word.partition("=")[2] for word in words if word.startswith("trust=")]
    if said and said not in (["true"], ["false"]):
        raise UserError(f"trust={said[-1]}: say trust=true once, to run the code that a run names, or leave it out")
    trust.take(trust.Trust(everything=said == ["true"]))
    trust.leave_run_folder()
    return [word for word in words if not word.startswith("trust=")]


def split_options(kind: Any, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The task's own options (plain names) and the changes to the recipe (every other key)."""
    from nepa_core.runtime.config import parse_assignments

    return _split(kind, parse_assignments(words))


def _split(kind: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from nepa_core.basics import UserError
    from nepa_core.runtime.config import validated

    written = set(given)
    given = {PART if key == "part" else key: at_home(key, value) for key, value in given.items()}
    own = {key: value for key, value in given.items() if key in kind.model_fields}
    if "part" in written and PART in written:
        raise UserError(f"part= is short for {PART}=: give one of them")
    options, changes = validated(kind, own), {key: value for key, value in given.items() if key not in own}
    for key in changes:
        _not_an_option(kind, key)
    return options, changes


def _not_an_option(kind: Any, key: str) -> None:
    """Refuse a word that is no key of any recipe, and nearly an option of the task.

    Raises:
        UserError: it is; the option is named.
    """
    from difflib import get_close_matches

    from nepa_core.basics import UserError
    from recipes.resolve import NETWORKS

    if "." in key or any(key in each.model_fields for each in NETWORKS):
        return
    if close := get_close_matches(key, kind.model_fields, n=1, cutoff=0.75):
        raise UserError(f"unknown key {key}; did you mean {close[0]}?")


def at_home(key: str, value: Any) -> Any:
    """Put the home directory for the ~ that some shells leave in out=~/runs and init=~/runs/x.

    Raises:
        RuntimeError: it is that of a user who does not exist.
        UserError: out= is no text, and safetensors would not find again what it writes there; or nothing is named.
    """
    from nepa_core.basics import UserError

    if value == "" and key in ("out", "init", "data.root"):
        raise UserError(f"{key}= is empty: name a {'run or folder' if key == 'init' else 'folder'}, or leave it out")
    if key == "out" and isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"out={value} is not UTF-8, and checkpoints can't be read there: give another name")
    if key == "out" and isinstance(value, str) and "\0" in value:
        raise UserError(f"out={value}: no name of a folder holds a null byte; give another one")
    if key in ("out", "init") and isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def _runs(words: list[str], asks_help: bool) -> int:
    from recipes.options import describe_fields

    runs = importlib.import_module("recipes.tasks.runs")
    folders = [word for word in words if "=" not in word or os.path.exists(word)]
    options, unknown = split_options(runs.Options, [word for word in words if word not in folders])
    if unknown:
        return _fail(f"nepa runs only reads: {', '.join(unknown)} can't be set; see nepa runs --help", 2)
    if asks_help:
        print(f"usage: nepa runs {RUNS}\n\n{runs.__doc__}\noptions:\n{describe_fields(runs.Options)}")
    else:
        runs.main([str(at_home("out", folder)) for folder in folders], options)
    return 0


def _print_completion(rest: list[str]) -> int:
    from recipes.completion import SHELLS, script, words_of

    if len(rest) != 1 or rest[0] not in SHELLS:
        return _fail(f"nepa completion needs the name of a shell after it: {', '.join(SHELLS)}", 2)
    modules = {name: importlib.import_module(task.module) for name, task in TASKS.items()}
    tasks: dict[str, Any] = {name: (module.Options, partial(_taken, name, module)) for name, module in modules.items()}
    tasks["runs"] = importlib.import_module("recipes.tasks.runs").Options, lambda _: {}
    of_recipes = [name for name, task in TASKS.items() if "RECIPE" in task.takes]
    print(script(rest[0], words_of(tasks, of_recipes, list(_recipes()))), end="")
    return 0


def _taken(name: str, task: Any, recipe: str) -> dict[str, Any]:
    """The keys of a recipe that a task takes, of it or of a run of it: none of a recipe of other tasks."""
    from nepa_core.basics import UserError
    from nepa_core.runtime.config import keys
    from recipes.resolve import find_recipe

    if "RECIPE" not in TASKS[name].takes:
        return _free(task, keys(find_recipe(recipe)()))
    try:
        return _settable(task, recipe, {})
    except UserError:
        return {}


def list_recipes() -> str:
    """Every public function of the preset files with its task and the first line of its docstring."""
    import inspect

    rows = []
    for path, function in _recipes().items():
        line = (function.__doc__ or "").strip().splitlines()[0]
        task = str(inspect.signature(function).return_annotation).removesuffix("Config").lower()
        rows.append((path, task, line))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {task:<{widths[1]}}  {line}" for name, task, line in rows)


def _recipes() -> dict[str, Any]:
    """The public functions of the preset files, by what a command calls them."""
    import recipes

    names = [info.name for info in pkgutil.iter_modules(recipes.__path__) if not info.ispkg]  # others are rooms
    modules = [importlib.import_module(f"recipes.{name}") for name in names]
    return {f"{m.__name__}:{name}": found for m in modules for name, found in _recipe_functions(m).items()}


def _recipe_functions(module: ModuleType) -> dict[str, Any]:
    """The public functions of a module that take nothing and, by their annotation, return a config."""
    import inspect

    found: dict[str, Any] = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        signature = inspect.signature(function)
        gives = signature.return_annotation  # a string, under `from __future__ import annotations`
        gives = gives if isinstance(gives, str) else getattr(gives, "__name__", "")
        own = function.__module__ == module.__name__ and not name.startswith("_")
        if own and gives.endswith("Config") and not signature.parameters:
            found[name] = function
    return found


def _version() -> str:
    """Of this program; importing the package would import torch."""
    file = os.path.join(os.path.dirname(__file__), "..", "nepa_core", "version.py")
    return str(runpy.run_path(os.path.realpath(file))["version"]())


def _help() -> str:
    rows = {f"{name} {task.takes}": task.gives for name, task in TASKS.items()}
    rows[f"runs {RUNS}"] = "the runs that there are and what differs; of several, their curves on one page"
    rows["recipes"] = "the built-in recipes, a line each"
    rows["completion bash, zsh or fish"] = "what that shell reads to complete the words of nepa"
    width = max(map(len, rows))
    return HELP.format(tasks="\n".join(f"  {usage:<{width}}  {gives}" for usage, gives in rows.items()))


def _settable(task: Any, target: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Every key of a recipe or run that the task lets one set, with its value."""
    from nepa_core.runtime.config import keys
    from recipes.configs import PretrainConfig
    from recipes.resolve import read_target

    read = getattr(task, "read_config", partial(read_target, PretrainConfig))
    return _free(task, keys(read(target, changes)))


def _free(task: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    free, fixed = getattr(task, "FREE", ("",)), getattr(task, "DECIDED", ())
    return {key: value for key, value in found.items() if key.startswith(free) and not _among(key, fixed)}


def _task_help(name: str, task: Any, target: str | None, changes: dict[str, Any]) -> str:
    from nepa_core.runtime.run import is_run
    from recipes.options import describe_fields, given

    lines = [f"usage: nepa {name} {TASKS[name].takes} [key=value ...]", "", (task.__doc__ or "").strip(), ""]
    if fields := describe_fields(task.Options):
        lines += ["options:", fields, ""]
    lines += getattr(task, "NOTES", [])
    if target is not None:
        found = _settable(task, target, changes)
        if not is_run(target) and (doc := _docstring(target)):
            lines += [f"{target}:", *(f"  {line}".rstrip() for line in doc.splitlines()), ""]
        told = f"keys of {target}:" if found else f"nepa {name} takes {target} as it is: no key of it can be set."
        lines += [told, *(f"  {key}={given(value)}" for key, value in found.items())]
    else:
        lines += [f"nepa {name} {TASKS[name].takes} --help lists every key that can be set, with its value."]
    return "\n".join(lines)


def _among(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key is one of these, or of a group among them ("model.")."""
    return key in names or f"{key.partition('.')[0]}." in names


def _docstring(target: str) -> str | None:
    """What a recipe says of itself: commands, hours, what to expect; None of what is no recipe."""
    import inspect

    from nepa_core.runtime.config import load_object

    return inspect.getdoc(load_object(target)) if ":" in target else None


_FIRST = 15.0
"""Seconds that the first of several processes has to say what is wrong, and to clear up."""


def _fail(message: str, status: int) -> int:
    """Say it once, also where torchrun started several processes.

    torchrun ends all of them as soon as one has failed. So the others wait for that while the first one speaks; where
    it does not, the error is of this process alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_FIRST)
        message = f"process {rank}: {message}"
    line = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in message)
    print(f"nepa: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return status


def leave(status: int) -> NoReturn:
    """End this process. One of several skips the teardown of C++ libraries.

    There the threads of gloo now and then abort a process whose work is done and written, and `torchrun` would call the
    whole job failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
