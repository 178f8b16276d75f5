"""What the checks of the READMEs are made of. Their one command is tests/readmes.py.

By the first word after the fence, a block is

    sql python yaml toml   verbatim in one file of the lesson (root README: of the repository). A
                           line that is only `...` leaves out some lines. The block may be moved to
                           the left as a whole. With `wrong` (meant to be wrong) or `typed` (by the
                           reader) as second word it is not checked.
    diff                   part of the diff between the lesson before and this one
    console                `$ ` and a command, and what it prints; `...` leaves out any number of
                           lines. With `unordered` the lines may come in any order; with `no-run`
                           it is not checked.
    mermaid                a diagram that mermaid can parse
    text, or nothing       not checked

All that is not checked stands in unchecked_blocks.txt, so that nothing goes unchecked by accident.

The console blocks of a README run in their order, on one copy of the work tree (but for lessons,
and tests, that they do not name) with one database of its own, from the root; each command in a
bash of its own. A command without output must succeed; one that is to fail shows its output to the
end. In commands and outputs /tmp is a directory of the copy's own, /repo is the copy, and vm the
host. Times and durations are not compared; process ids and the like need only be the same, or
different, where those in the README are.

A worked answer in <details> has a copy and a database of its own. Its diff is a patch (-p1) to the
lesson's files, and a console block after it shows that the answer works. In its /tmp are the files
that its exercise writes, each in a block with one command, `cat > /tmp/...` or
`sed ... > /tmp/...`.
"""
