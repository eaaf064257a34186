# Completes the options of the project's programs in bash: source tools/completion.bash
#
# They are read from --help, once for each program: the first Tab at one takes as long as that, further ones some
# hundredths of a second. argcomplete would start the program at every Tab.
# shellcheck shell=bash

_puma_options() { # ROOT COMMAND...: its options, from a file in the cache unless the code has changed since
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/puma_completion root=$1 program name folders
    program=${!#}
    name=$cache/$(tr / _ <<<"$root/${program##*/}")
    folders=("$root"/{pipeline,tools,benchmarks}) # programs have options of other modules, too
    if [ ! -s "$name" ] || [ -n "$(find "${folders[@]}" -name '*.py' -newer "$name" -print -quit 2>/dev/null)" ]; then
        mkdir -p "$cache"
        "${@:2}" --help 2>/dev/null | grep -oE -- '(^|[ ,[])--[a-zA-Z][a-zA-Z0-9_.-]*' |
            tr -d ' ,[' | sort -u >"$name"
    fi
    cat "$name"
}

_puma_complete() {
    local word=${COMP_WORDS[COMP_CWORD]} python=python place program options
    COMPREPLY=()
    [[ $word == -* ]] || return 0
    [[ ${COMP_WORDS[0]} == */* ]] && python=${COMP_WORDS[0]%/*}/python # of .venv/bin, which need not be active
    for place in "${!COMP_WORDS[@]}"; do
        program=${COMP_WORDS[place]}
        case $program in
        *tools/*.py) options=$(_puma_options "$(realpath "$(dirname "$program")/..")" "$python" "$program") ;;
        pipeline.train | benchmarks.*) [ -d pipeline/config ] && options=$(_puma_options "$PWD" "$python" -m "$program") ;;
        *) continue ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
        return 0
    done
}

# Where it has nothing to say, the file names that bash itself would offer.
complete -o default -F _puma_complete python python3 torchrun
