"""`smtune bench`: what a step costs, against the floor and against what a user would pick instead.

`subjects` are the models, `arms` the methods, `measure` what is measured of one of them, `worker` the process in which,
`run` the order: all arms of a group take turns in one process, on the same weights, a floor step beside each, so that
what the machine does meanwhile meets them alike; then each is counted in a fresh process (docs/adr/0021).
"""
