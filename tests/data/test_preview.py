from jaxdistill.data import pipeline
from jaxdistill.data.preview import render_row


def test_a_row_as_text(jsonl, tmp_path, byte_tokenizer):
    path = jsonl(
        [{"prompt": "ask\x1b[31m", "completion": "yes\n"}, {"prompt": "", "completion": "n"}]
    )
    dataset = pipeline.build(
        path, byte_tokenizer, seq_len=32, loss_on="completion", cache_dir=tmp_path / "cache"
    )
    assert render_row(dataset, 0, byte_tokenizer) == (
        "[row 0, segment 1: 13 tokens, 5 count]\n"
        "ask\\x1b[31m⟦yes\n<|end|>⟧\n"
        "[row 0, segment 2: 2 tokens, 1 count]\n"
        "n⟦<|end|>⟧"
    )
