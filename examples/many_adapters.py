"""Several adapters in one model: add, switch, sum, switch off, save by name, remove, load again."""

import tempfile

import torch
from assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import idlora_ext

NAME = smollm2()  # a directory with a small real model; any causal language model's name or directory will do
TEXTS = {"count": "one two three four five six seven eight", "spell": "a b c d e f g h i j k l m n o p"}


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
    tokens = {name: tokenizer(text, return_tensors="pt").input_ids for name, text in TEXTS.items()}

    def losses(title: str) -> dict[str, float]:
        result = {name: model(input_ids=ids, labels=ids).loss.item() for name, ids in tokens.items()}
        print(f"{title:<24}", result)
        return result

    base = losses("base model")
    for name, ids in tokens.items():  # the newest adapter is the active and the trainable one
        idlora_ext.apply(model, adapter_name=name, target_modules=["q_proj", "up_proj"], r=32, progress=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for name in TEXTS:
        model.set_adapter(name)
        assert losses(f"adapter {name}")[name] < base[name]
    model.eval()
    rows = tokens["count"][:, :4].expand(3, -1)
    with torch.no_grad(), idlora_ext.adapter_names(model, ["spell", "__base__", "count"]):  # one batch, row by row
        print("one batch, three rows   ", model(input_ids=rows).logits[:, -1].argmax(-1).tolist())
    model.set_adapter(list(TEXTS))  # both updates, each computed from the base layer's output
    both = losses("both, summed")
    model.disable_adapters()
    assert losses("switched off") == base
    model.enable_adapters()

    with tempfile.TemporaryDirectory() as directory:
        for name in TEXTS:
            idlora_ext.save(model, f"{directory}/{name}", name)
        idlora_ext.remove(model)
        assert losses("removed") == base
        for name in TEXTS:
            idlora_ext.load(model, f"{directory}/{name}", name)
    model.set_adapter(list(TEXTS))
    assert losses("loaded again, summed") == both


if __name__ == "__main__":
    main()
