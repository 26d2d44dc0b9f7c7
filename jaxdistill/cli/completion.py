"""Completion for shells, `jaxdistill completion bash|zsh|fish`: a script that starts no Python."""

import argparse
import shlex
from dataclasses import dataclass, field

from jaxdistill.config import inherit, keys

# Part of every script: `_jaxdistill_say ENTRY` prints what may stand at a place, one word a line.
# The places are "COMMAND" (what comes below it, or its positional words), "COMMAND -" (its
# options), "COMMAND --option" (its values) and "key=" (values of a setting).
_SHARED = r"""
_jaxdistill_replies() { # what may stand in place of the last word, given all words after the tool
  local jd_command='' jd_option='' jd_count=0 jd_word
  while [ $# -gt 1 ]; do
    jd_word=$1
    shift
    if [ -n "$jd_option" ]; then
      jd_option=''
    elif [ "${jd_word#-}" != "$jd_word" ]; then
      if _jaxdistill_has "$jd_command $jd_word"; then jd_option=$jd_word; fi
    elif [ $jd_count = 0 ] && _jaxdistill_has "${jd_command:+$jd_command }$jd_word"; then
      jd_command="${jd_command:+$jd_command }$jd_word"
    else
      jd_count=$((jd_count + 1))
    fi
  done
  case $1 in
  -*=*) _jaxdistill_say "$jd_command ${1%%=*}" | sed "s|^|${1%%=*}=|" ;;
  *=*) _jaxdistill_say "${1%%=*}=" | sed "s|^|${1%%=*}=|" ;;
  *)
    if [ -n "$jd_option" ]; then
      _jaxdistill_say "$jd_command $jd_option"
    elif [ "${1#-}" != "$1" ]; then
      _jaxdistill_say "$jd_command -"
    elif [ $jd_count = 0 ]; then
      _jaxdistill_say "$jd_command"
    elif _jaxdistill_has "$jd_command ="; then
      _jaxdistill_say "="
    fi
    ;;
  esac
}
"""
# bash splits words at "=", so a setting comes as three words, of which the last one is replaced.
_BASH = r"""
_jaxdistill() {
  local jd_before=("${COMP_WORDS[@]:1:COMP_CWORD-1}") jd_word=${COMP_WORDS[COMP_CWORD]} jd_cut=''
  local jd_last=$((COMP_CWORD - 2))
  if [ "$jd_word" = '=' ]; then
    jd_cut="${COMP_WORDS[COMP_CWORD-1]}="
    jd_word=''
  elif [ "${COMP_WORDS[COMP_CWORD-1]}" = '=' ]; then
    jd_cut="${COMP_WORDS[COMP_CWORD-2]}="
    jd_last=$((COMP_CWORD - 3))
  fi
  if [ -n "$jd_cut" ]; then jd_before=("${COMP_WORDS[@]:1:jd_last}"); fi
  local IFS=$'\n'
  COMPREPLY=($(_jaxdistill_replies "${jd_before[@]}" "$jd_cut$jd_word" |
    while read -r jd_one; do
      case $jd_one in "$jd_cut$jd_word"*) printf '%s\n' "${jd_one#"$jd_cut"}" ;; esac
    done))
  case ${COMPREPLY[0]-} in *=) compopt -o nospace 2> /dev/null ;; esac
}
complete -o default -F _jaxdistill jaxdistill
"""
_ZSH = r"""
_jaxdistill() {
  local -a jd_replies jd_open
  jd_replies=(${(f)"$(_jaxdistill_replies "${(@)words[2,CURRENT]}")"})
  jd_open=(${(M)jd_replies:#*=})
  jd_replies=(${jd_replies:#*=})
  if (( $#jd_replies + $#jd_open )); then
    compadd -S '' -- $jd_open
    compadd -- $jd_replies
  else
    _files
  fi
}
case "${funcstack[1]-}" in
_jaxdistill) _jaxdistill "$@" ;; # zsh has found this file by itself
*) compdef _jaxdistill jaxdistill ;;
esac
"""
# fish has a language of its own: the functions run in sh. Where nothing is offered, files are.
_FISH = r"""
function _jaxdistill_replies
  set -l jd_before (commandline -opc)
  set -e jd_before[1]
  sh -c "$_jaxdistill_functions"' _jaxdistill_replies "$@"' sh $jd_before (commandline -ct)
end
function _jaxdistill_offers
  set -l jd_typed '^'(string escape --style=regex -- (commandline -ct))
  string match --quiet --regex -- $jd_typed (_jaxdistill_replies)
end
complete -c jaxdistill -f -n _jaxdistill_offers -a '(_jaxdistill_replies)'
"""


@dataclass
class CompletionTable:
    """What may stand where.

    Attributes:
      words: place -> its words.
      known: commands, "COMMAND --option" for options that take a value, and "COMMAND =" for those
        that take settings.
    """

    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script of a shell for the commands of a parser."""
    table = CompletionTable()
    _read(parser, "", table)
    settings = [path for path in keys.all_keys() if not _is_section(path)]
    table.words["="] = tuple(".".join(path) + "=" for path in settings)
    for path in settings:
        table.words[".".join(path) + "="] = keys.values(path)
    table.words["init"] = tuple(inherit.recipes())
    table.words["validate --explain"] = tuple(".".join(path) for path in keys.all_keys())
    table.words = {place: words for place, words in table.words.items() if words}
    functions = _functions(table) + _SHARED
    if shell == "fish":
        quoted = functions.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -g _jaxdistill_functions '{quoted}'\n{_FISH}"
    head = "#compdef jaxdistill\n" if shell == "zsh" else ""
    return head + functions + {"bash": _BASH, "zsh": _ZSH}[shell]


def _read(parser: argparse.ArgumentParser, command: str, table: CompletionTable) -> None:
    """Notes the words below a parser and all of its own parsers."""
    if command:
        table.known.add(command)
    flags: list[str] = []
    further: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            table.words[command] = tuple(name.split()[0] for name in action.choices)
            for name, below in action.choices.items():
                first, _, rest = name.partition(" ")
                if rest:  # `teacher cache ls` beside `teacher cache CONFIG`
                    further.setdefault(f"{command} {first}", []).append(rest)
                _read(below, f"{command} {name}".strip(), table)
            continue
        choices = tuple(map(str, action.choices or ()))
        flags += action.option_strings
        for flag in action.option_strings:
            if action.nargs != 0:
                table.known.add(f"{command} {flag}")
            table.words[f"{command} {flag}"] = choices
        if not action.option_strings and choices:
            table.words[command] = choices
        if action.dest == "overrides":
            table.known.add(f"{command} =")
    table.words[f"{command} -"] = tuple(flags)
    table.words |= {place: tuple(words) for place, words in further.items()}


def _is_section(path: tuple[str, ...]) -> bool:
    return any(other[: len(path)] == path and other != path for other in keys.all_keys())


def _functions(table: CompletionTable) -> str:
    """The table as two functions of any POSIX shell."""
    known = "|".join(map(shlex.quote, sorted(table.known)))
    lines = [
        "_jaxdistill_has() {",
        f"  case $1 in {known}) return 0 ;; esac",
        "  return 1",
        "}",
        "_jaxdistill_say() {",
        "  case $1 in",
    ]
    alike: dict[tuple[str, ...], list[str]] = {}
    for place, words in table.words.items():
        alike.setdefault(tuple(dict.fromkeys(words)), []).append(place)
    for words, places in alike.items():
        what = " ".join(map(shlex.quote, words))
        lines.append(f"  {'|'.join(map(shlex.quote, places))}) printf '%s\\n' {what} ;;")
    return "\n".join([*lines, "  esac", "}"])
