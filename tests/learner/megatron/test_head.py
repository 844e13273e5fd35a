"""What the loss head sends: 16 bytes a row and rank, and the hidden states' gradient; never logits or weights."""


def in_chunks(rows):
    return [min(8, rows - start) for start in range(0, rows, 8)]


def test_one_gather_a_chunk_and_the_gradient_of_the_hidden_states(results_of):
    found = results_of(2)["head_collectives"]["tp=2 pp=1"]
    (_, rows, hidden_size), collectives = found["sizes"], found["collectives"]
    assert len(in_chunks(rows)) > 1
    gathers = [size for name, size in collectives if name == "allgather_base"]
    sums = [size for name, size in collectives if name == "allreduce"]
    assert gathers == [2 * 4 * chunk for chunk in in_chunks(rows)]  # 4 numbers a row from each of 2 ranks
    assert sum(sums) == rows * hidden_size
    assert len(gathers) + len(sums) == len(collectives)


def test_under_sequence_parallelism_hidden_states_come_and_their_gradient_goes_once(results_of):
    found = results_of(2)["head_collectives"]["tp=2 pp=1 sp=true"]
    (tokens, rows, hidden_size), collectives = found["sizes"], found["collectives"]
    gathers = [size for name, size in collectives if name == "allgather_base"]
    assert gathers == [tokens * hidden_size, *(2 * 4 * chunk for chunk in in_chunks(rows))]
    (rest,) = [entry for entry in collectives if entry[0] != "allgather_base"]
    assert rest == ("reduce_scatter_base", tokens * hidden_size)
