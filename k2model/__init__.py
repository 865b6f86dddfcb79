"""The language model: its formats, its decoder, its engine and the compression that makes it cheap."""
