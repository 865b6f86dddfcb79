"""The names of the data: what crosses a border, and the errors people see. Standard library and pyarrow only."""
