"""Train a tiny Llama and its tokenizer from one text file, on a CPU; how the bundled model was made.

    pip install 'elutq[quantize]'
    python examples/train_tiny.py --text stories.txt --out my-model --minutes 40
    elutq generate my-model -p "Once upon a time"

Documents in the file are separated by lines that hold only <|endoftext|>; every hundredth is held out to
measure the loss. The output is an ordinary Hugging Face folder in bfloat16, ready for `elutq quantize`.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Words with their leading space, digits one by one, runs of punctuation, runs of white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_documents(path: Path) -> list[str]:
    """Documents of a text file, blank ones left out."""
    documents = path.read_text(encoding="utf-8").split(f"\n{END}\n")
    return [document for document in documents if document.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; token 0 is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[torch.Tensor]:
    """Token ids of each document, <|endoftext|> at its end."""
    return [torch.tensor([*encoding.ids, 0]) for encoding in tokenizer.encode_batch(documents)]


def windows(documents: list[torch.Tensor], batch: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [batch, context + 1] windows over the documents, which are shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = batch * (context + 1)
    stream = torch.empty(0, dtype=torch.long)
    while True:
        while len(stream) < size:
            order = torch.randperm(len(documents), generator=generator).tolist()
            stream = torch.cat([stream, *(documents[i] for i in order)])
        yield stream[:size].view(batch, context + 1)
        stream = stream[size:]


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings, its residual projections scaled down by depth as GPT-2's are."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * args.layers))
    return model


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per token of [batch, context + 1] windows."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3%, then a cosine down to a tenth. progress: 0 to 1."""
    if progress < 0.03:
        return peak * (progress / 0.03)
    return peak * (0.55 + 0.45 * math.cos(math.pi * (progress - 0.03) / 0.97))


def train(model: LlamaForCausalLM, documents: list[torch.Tensor], args: argparse.Namespace) -> None:
    """Train for `args.steps` steps, or for `args.minutes`."""
    held_out = torch.cat(documents[::100])
    training = [document for i, document in enumerate(documents) if i % 100]
    count = min(16, len(held_out) // (args.context + 1))
    validation = held_out[: count * (args.context + 1)].view(count, args.context + 1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = windows(training, args.batch, args.context, args.seed)
    start = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        # A little above zero, so that the first step moves too.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(max(progress, 1e-3), args.learning_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = mean_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        minutes = (time.monotonic() - start) / 60
        progress = step / args.steps if args.steps else minutes / args.minutes
        if step % 20 == 0 or progress >= 1:
            tokens = step * args.batch * args.context
            line = f"step {step}  {tokens / 1e6:.2f}M tokens  {minutes:.1f} min  loss {loss:.3f}"
            if count and (step % 200 == 0 or progress >= 1):
                with torch.no_grad():
                    line += f"  held-out loss {mean_loss(model, validation):.3f}"
            print(line, flush=True)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="documents separated by <|endoftext|> lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--minutes", type=float, default=40, help="how long to train (the schedule fits itself to it)"
    )
    parser.add_argument("--steps", type=int, help="train this many steps instead; repeatable to the bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--bf16", action="store_true", help="multiply in bfloat16; faster where the CPU has it"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    documents = read_documents(args.text)
    if len(documents) < 2:
        parser.error(f"{args.text} holds {len(documents)} document(s); separate documents by lines of {END}")
    tokenizer = train_tokenizer(documents, args.vocab)
    encoded = encode(tokenizer, documents)
    model = build_model(args, tokenizer.get_vocab_size())
    print(
        f"{len(documents)} documents, {sum(map(len, encoded)) / 1e6:.2f}M tokens, vocabulary "
        f"{tokenizer.get_vocab_size()}, {model.num_parameters() / 1e6:.2f}M parameters",
        flush=True,
    )
    train(model, encoded, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=args.context
    ).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
