"""Damaged and hostile images by the hundred thousand: python -m campaigns.fuzz [--seconds N]

The core is built with sanitizers and with a call at each of its branches (campaigns/coverage.c), so
that an image which leads to a branch that none before has taken is kept and changed further. Changes
are made where they matter: ``mutate`` knows the fields and tables of the format. ``target`` uses each
image in every way and says what was wrong; ``seeds`` makes the images to begin with, and ``corpus``
has what earlier runs found on top of them.
"""

#: Seconds of a processor that one image may take: what a passphrase may cost, and some.
CPU_LIMIT = 240
