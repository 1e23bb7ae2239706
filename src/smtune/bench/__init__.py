"""`smtune bench`: what a step costs, against the floor and against what a user would pick instead.

`subjects` are the models, `arms` the methods, `measure` what is measured of one of them in its own process
(`worker`), `run` the order in which: all arms of a group take turns, a floor step beside each, so that what the
machine does meanwhile meets them alike. Imports smtune's public surface; nothing of it is imported by other parts but
the command line.
"""
