"""What the demonstration trains on: a corpus made on the spot, and its way into fairseq's binary format."""
