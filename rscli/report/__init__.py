"""Tables, exports and plots of certification results.

`align` brings results together, `summary` computes every figure, `groups` averages over seeds, `published` holds results
against what was published (`recipe` says how a model was trained, `shelf` finds the row), `tables` turns figures into cells,
`render` and `export` turn those into text, and `plot` draws. Nothing here prints, except `print_tables` to a console given.
"""
