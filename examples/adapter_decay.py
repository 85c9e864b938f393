"""A language model of transformers, adapted to few sentences by LoRA: a tuned weight decay for each adapter matrix.

    python examples/adapter_decay.py [--data FOLDER] [--sentences 64] [--hyper-steps 40] [--seed 0]

needs `pip install transformers peft`. A small Llama learns a text from random weights. Then its adapters, the inner
weights, are fitted to a few sentences of another text; the decays, the hyperparameters, to validation sentences of that
text. With `--data` the texts are two kinds of sentences of the Penn Treebank (FOLDER/ptb/ptb.train.txt), those about
millions and shares and the others; without it, parts of the manual that comes with Python.

The rest is as people train such models: sentences of several lengths in batches that a collator pads, loaders with a
worker process, batches as the tokenizer makes them (`BatchEncoding`), and bfloat16 autocast. The losses are written as
for training.
"""

import argparse
import copy
import itertools
import math
import os
import pydoc_data.topics
import random
import re
from collections import Counter
from pathlib import Path

import peft
import tokenizers
import torch
import transformers

import hvp_engine as hvp

WORDS, LONGEST, ROWS = 300, 16, 16
INNER_STEPS, WARMUP_STEPS = 4, 40
OTHER_TOPICS, OTHER_WORDS = re.compile("string|debugger|typesmapping"), re.compile(r"\b(million|billion|shares)\b")
"""What the model is adapted to: these topics of the manual, sentences of the Penn Treebank with these words."""


def texts(data=None):
    """Sentences to learn the language from, and sentences of another text to adapt to: two lists of texts."""
    general, special = [], []
    if data is not None:
        for line in Path(data, "ptb", "ptb.train.txt").read_text().splitlines()[:15_000]:
            (special if OTHER_WORDS.search(line) else general).append(line.strip())
    else:
        for topic, text in pydoc_data.topics.topics.items():
            plain = re.sub(r"[^a-z.:]+", " ", text.lower())
            (special if OTHER_TOPICS.search(topic) else general).extend(re.split(r"[.:] ", plain))
    return [[text for text in part if len(text.split()) >= 4] for part in (general, special)]


def tokenizer_of(texts):
    """A tokenizer with the most frequent words of the texts."""
    counts = Counter(word for text in texts for word in text.split())
    names = ["<pad>", "<s>", "</s>", "<unk>", *(word for word, _ in counts.most_common(WORDS) if word != "<unk>")]
    vocabulary = {word: number for number, word in enumerate(names[:WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def loader_of(tokenizer, texts, shuffle, workers=1):
    """Batches of sentences, padded to the longest one of each: a `BatchEncoding` with a mask and labels."""
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]} for text in texts]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=8)
    return torch.utils.data.DataLoader(
        rows, ROWS, shuffle, num_workers=workers, persistent_workers=workers > 0, collate_fn=collator
    )


def language_model():
    """A small Llama with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def train(model, loader, steps, lr=3e-3):
    """Plain training of what requires grad."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(batches, steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapted(model):
    """The model with adapters at all of its linear layers; only they are trained."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@torch.no_grad()
def perplexity(model, loader):
    """exp of the mean cross-entropy of the words."""
    model.eval()
    total = count = 0
    for batch in loader:
        words = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(model(**batch).loss) * words, count + words
    model.train()
    return math.exp(total / count)


def decays_of(model, each):
    """The hyperparameters: log-decays, one for `each` matrix by its name, or one for all of them."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: torch.tensor(-5.0) for name in (names if each else ["all"])}


def losses_of(model):
    """The training loss, with decays, and the validation loss, of the adapters' weights."""
    net = hvp.functional(model)

    def val_loss(weights, decays, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return net(weights, **batch).loss

    def train_loss(weights, decays, batch):
        decay = sum(decays[name if name in decays else "all"].exp() * w.square().sum() for name, w in weights.items())
        return val_loss(weights, decays, batch) + decay

    return train_loss, val_loss


def tuner_of(model, decays):
    """Algorithm 1 on the adapters.

    While the weights overfit, each rise of a decay lowers the validation loss at once. So the steps are small, and the
    bound keeps the adapters alive: where both factors are zero, no gradient brings them back.
    """
    return hvp.Tuner(
        model,
        decays,
        *losses_of(model),
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=5e-3),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.2),
        solver=hvp.Neumann(5, alpha=0.05),
        inner_steps=INNER_STEPS,
        warmup_steps=WARMUP_STEPS,
        bounds=(-8.0, -2.0),
    )


def run(data=None, sentences=64, hyper_steps=40, seed=0, pretraining=250, workers=1):
    """For each kind of decay: the number of hyperparameters; training, validation and test perplexity."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loaders' workers are forked
    general, special = texts(data)
    random.Random(seed).shuffle(special)
    parts = special[:sentences], special[sentences : 3 * sentences], special[3 * sentences :][:400]
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(general)
    base = language_model()
    train(base, loader_of(tokenizer, general, True, workers), pretraining)
    rows = []
    for kind in ("not adapted", "no decay", "one decay", "one for each matrix"):
        torch.manual_seed(seed)
        loaders = [loader_of(tokenizer, part, part is parts[0], workers) for part in parts]
        model, decays = adapted(copy.deepcopy(base)), {}
        if kind == "no decay":
            train(model, loaders[0], WARMUP_STEPS + INNER_STEPS * hyper_steps, lr=5e-3)
        elif kind != "not adapted":
            decays = decays_of(model, each=kind != "one decay")
            tuner_of(model, decays).fit(*loaders[:2], hyper_steps, progress=False)
        rows.append((kind, len(decays), *(perplexity(model, loader) for loader in loaders)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FOLDER", help="with ptb/ptb.train.txt (default: the manual of Python)")
    parser.add_argument("--sentences", type=int, default=64, help="to adapt to; twice as many validate")
    parser.add_argument("--hyper-steps", type=int, default=40)
    parser.add_argument("--pretraining", type=int, default=250, help="training steps of the model itself")
    parser.add_argument("--seed", type=int, default=0)
    rows = run(**vars(parser.parse_args()))
    print(f"{'weight decay':<22}{'hyperparameters':>17}{'training':>11}{'validation':>12}{'test perplexity':>17}")
    for name, count, *perplexities in rows:
        print(f"{name:<22}{count:>17}{perplexities[0]:>11.1f}{perplexities[1]:>12.1f}{perplexities[2]:>17.1f}")


if __name__ == "__main__":
    main()
