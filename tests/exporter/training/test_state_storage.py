import pytest
import torch
from medusa_exporter.training import hidden_states, state_storage
from medusa_runtime.errors import CapacityError

CPU = torch.device("cpu")


def test_states_lie_in_memory_while_they_fit(tmp_path):
    room = state_storage.allocate_states(10, 4, torch.bfloat16, CPU, tmp_path)
    assert (room.shape, room.dtype, room.device) == ((10, 4), torch.bfloat16, CPU)
    assert not list(tmp_path.iterdir())


def test_states_that_fit_no_memory_go_to_disk_or_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(state_storage, "free_bytes", lambda _device=None: 1000)
    with pytest.raises(CapacityError, match="with --disk"):
        state_storage.allocate_states(1000, 4, torch.float32, CPU)
    mapped = []
    real = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **more: (mapped.append(args), real(*args, **more))[1])
    room = state_storage.allocate_states(1000, 4, torch.float32, CPU, tmp_path / "states")
    assert len(mapped) == 1
    room[:] = torch.arange(4000).reshape(1000, 4)
    assert state_storage.gather_rows(room, torch.tensor([7, 3])).tolist() == [[28, 29, 30, 31], [12, 13, 14, 15]]
    assert not list((tmp_path / "states").iterdir())  # no name is left behind
    with pytest.raises(CapacityError, match="larger disk"):
        state_storage.allocate_states(10**15, 4, torch.float32, CPU, tmp_path)


def test_the_same_states_on_disk(model, counting_data, tmp_path, monkeypatch):
    expected = hidden_states.collect_positions(model, counting_data, 2, taps=(1,))
    monkeypatch.setattr(state_storage, "free_bytes", lambda _device=None: 1000)
    found = hidden_states.collect_positions(model, counting_data, 2, taps=(1,), disk=tmp_path)
    assert torch.equal(found.hidden, expected.hidden)


def test_taps_are_what_a_layer_reads(model, counting_data):
    plain = hidden_states.collect_positions(model, counting_data, 2)
    found = hidden_states.collect_positions(model, counting_data, 2, taps=(1, 0))
    assert torch.equal(found.hidden[:, :64], plain.hidden)
    tokens = torch.from_numpy(counting_data.row(0)[0].astype("int64"))[None]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        first = model.base_model.layers[0].input_layernorm(embedded)[0]
        states_of = model(input_ids=tokens, output_hidden_states=True).hidden_states
        second = model.base_model.layers[1].input_layernorm(states_of[1])[0]
    lines = found.row == 0
    places = found.place[lines]
    torch.testing.assert_close(found.hidden[lines, 64:128], second[places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.hidden[lines, 128:], first[places], atol=1e-5, rtol=1e-5)
