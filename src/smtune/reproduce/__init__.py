"""The paper's experiments, run anew: what is compared is declared, one runner runs it, one renderer shows it.

    experiments/*.yaml   rows of a table or figure, with the paper's own numbers
    tiers/*.yaml         model, data, recipe, seeds and learning rates that fill them in
    declared             reads both                     cells      the grid, and what of it is still wanted
    setting              data of a call, hashed         arms       a cell's model (rivals: `smtune.bench.arms`)
    train, work          one cell                       memory     a step counted without weights
    store, run           results by content; the sweep  layouts    pages, tables, figures
    mini                 the tier's own base model      dry        what a request would take
    evidence             the answer: when SMT wins, which claims hold, from stored cells

docs/reproduce.md has the commands, ADR 0011 the reasons. Only the command line imports it.
"""
