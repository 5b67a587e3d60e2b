"""Tables, exports and plots of certification results.

`align` brings results together, `summary` computes every figure, `tables` turns figures into cells, `render` and `export`
turn those into text, and `plot` draws. Nothing here prints.
"""
