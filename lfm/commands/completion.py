"""Completion: `eval "$(lfm completion bash)"`: the words of the command line, and files after them."""

import argparse

from lfm.exits import command

SHELLS = {
    "bash": """_lfm() {{
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{words}" -- "${{COMP_WORDS[1]}}"))
    else
        COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
    fi
}}
complete -o filenames -F _lfm lfm""",
    "zsh": """#compdef lfm
_lfm() {{
    if (( CURRENT == 2 )); then compadd {words}; else _files; fi
}}
compdef _lfm lfm""",
    "fish": """complete -c lfm -f -n __fish_use_subcommand -a "{words}"
complete -c lfm -F -n "not __fish_use_subcommand\"""",
}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Print a shell's completion of `lfm`, to be evaluated by it.")
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args().shell
    # The table of words stands above the commands; only here does one look up.
    from importlib import import_module

    print(SHELLS[shell].format(words=" ".join(import_module("lfm.cli").WORDS)))
