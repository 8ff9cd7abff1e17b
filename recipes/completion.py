"""Shell completion: `nepa completion bash` (or zsh, fish) prints what the shell is to read.

The words are those of the help: tasks, built-in recipes, and for each task its options and the keys of the recipes that
it takes. They are worked out once, when the script is printed, because importing torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from recipes.options import choices


class Words(NamedTuple):
    """What can be completed.

    Attributes:
        tasks: the words after `nepa`. recipes: the built-in ones, for the word after the tasks `of_recipes`.
        of_folders: tasks that take the folder of a run, and no recipe.
        keys: task -> the words behind.
    """

    tasks: list[str]
    recipes: list[str]
    of_recipes: list[str]
    of_folders: list[str]
    keys: dict[str, list[str]]


def words_of(
    tasks: Mapping[str, tuple[type[BaseModel], Callable[[str], Mapping[str, Any]]]],
    of_recipes: Sequence[str],
    recipes: Sequence[str],
) -> Words:
    """The words of a command.

    Args:
        tasks: name -> its options, and recipe -> the keys that the task lets one set of it.
        of_recipes: those that take a recipe. recipes: the built-in ones.
    """
    keys: dict[str, list[str]] = {}
    for name, (options, settable) in tasks.items():
        found: dict[str, None] = {}
        for option, field in options.model_fields.items():
            found |= dict.fromkeys([f"{option}={each}" for each in choices(field.annotation)] or [f"{option}="])
        for recipe in recipes:
            found |= dict.fromkeys(f"{key}=" for key in settable(recipe) if key != "recipe")
        keys[name] = [*found, "--help", "--print-config", "-q"]
    of_folders = [name for name in tasks if name not in of_recipes]
    said = [*tasks, "recipes", "completion", "--help", "--version"]
    return Words(said, list(recipes), list(of_recipes), of_folders, keys)


def script(shell: str, words: Words) -> str:
    """What a shell reads to complete the words of `nepa`.

    Raises:
        KeyError: it is none of `SHELLS`.
    """
    return SHELLS[shell](words)


def _bash(words: Words) -> str:
    cases = "\n".join(f"      {task}) words='{' '.join(keys)}' ;;" for task, keys in words.keys.items())
    return f"""# eval "$(nepa completion bash)", in ~/.bashrc
_nepa() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" words="" folders="" given word each place
  word="${{line##*[[:space:]]}}"
  read -ra given <<< "$line"
  place=$(( ${{#given[@]}} - (${{#word}} > 0) ))
  case "$place:${{given[1]}}" in
    1:*) words='{" ".join(words.tasks)}' ;;
    {"|".join(f"2:{task}" for task in words.of_recipes)}) words='{" ".join(words.recipes)}' ;;
    2:completion) words='{" ".join(SHELLS)}' ;;
    {"|".join(f"2:{task}" for task in words.of_folders)}) folders=1 ;;
    *) [[ ${{given[1]}} == runs ]] && folders=1
    case "${{given[1]}}" in
{cases}
    esac ;;
  esac
  COMPREPLY=()
  if [[ $folders ]]; then
    while IFS= read -r each; do COMPREPLY+=("$each"); done < <(compgen -d -- "$word")
    (( ${{#COMPREPLY[@]}} )) && compopt -o filenames 2> /dev/null
  fi
  (( ${{#COMPREPLY[@]}} )) || COMPREPLY=($(compgen -W "$words" -- "$word"))
  # bash takes = and : for ends of words, and puts in what lies behind the last of them
  COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*[=:]}}"}}"}}")
  [[ "${{COMPREPLY[*]}}" == *= ]] && compopt -o nospace 2> /dev/null
  return 0
}}
complete -o default -F _nepa nepa
"""


def _zsh(words: Words) -> str:
    cases = "\n".join(f"      {task}) found=({' '.join(keys)}) ;;" for task, keys in words.keys.items())
    return f"""# eval "$(nepa completion zsh)", in ~/.zshrc, below compinit
_nepa() {{
  local -a found
  case $CURRENT in
    2) found=({" ".join(words.tasks)}) ;;
    3) case $words[2] in
      {"|".join(words.of_recipes)}) found=({" ".join(words.recipes)}); _files ;;
      completion) found=({" ".join(SHELLS)}) ;;
      {"|".join(words.of_folders)}) _files -/ ;;
    esac ;;
    *) [[ $words[2] == runs ]] && _files -/
    case $words[2] in
{cases}
    esac ;;
  esac
  compadd -S '' -- ${{(M)found:#*=}}
  compadd -- ${{found:#*=}}
}}
compdef _nepa nepa
"""


def _fish(words: Words) -> str:
    folders = "(__fish_complete_directories (commandline -ct) folder)"
    lines = [
        "# nepa completion fish | source, in ~/.config/fish/config.fish",
        "function __nepa_at; test (count (commandline -opc)) -eq $argv[1]; end",
        'function __nepa_of; set -l given (commandline -opc); contains -- "$given[2]" $argv; end',
        "function __nepa_in; test (count (commandline -opc)) -gt 2; and __nepa_of $argv; end",
        f"complete -c nepa -f -n '__nepa_at 1' -a '{' '.join(words.tasks)}'",
        f"complete -c nepa -n '__nepa_at 2; and __nepa_of {' '.join(words.of_recipes)}' -a '{' '.join(words.recipes)}'",
        f"complete -c nepa -f -n '__nepa_at 2; and __nepa_of completion' -a '{' '.join(SHELLS)}'",
        f"complete -c nepa -f -n '__nepa_at 2; and __nepa_of {' '.join(words.of_folders)}' -a '{folders}'",
        f"complete -c nepa -f -n '__nepa_in runs' -a '{folders}'",
    ]
    lines += [f"complete -c nepa -f -n '__nepa_in {task}' -a '{' '.join(keys)}'" for task, keys in words.keys.items()]
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Words], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
