"""vLLM in this process, told what to do by lines on stdin. Runs in vLLM's own environment.

    python vllm_side.py MODEL_DIR DTYPE

Each line is `{"prompts": [[id, …], …], "max_tokens": n}`; each answer a line as
`engine_side.py`'s. The engine's core runs in this process, so that no time goes
into talking to another. Imports nothing of ours.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHOWN = ("VLLM_CPU", "OMP_", "KMP_", "GOMP_")


def main():
    """Serve until stdin ends. What vLLM prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import vllm

    started = time.perf_counter()
    engine = vllm.LLM(
        sys.argv[1], skip_tokenizer_init=True, dtype=sys.argv[2], max_model_len=2048,
        max_num_seqs=64, enable_prefix_caching=True, disable_log_stats=True,
    ).llm_engine  # fmt: skip
    about = {
        "ready_s": time.perf_counter() - started,
        "settings": {name: value for name, value in os.environ.items() if name.startswith(SHOWN)},
        "versions": {"vllm": vllm.__version__, "vllm_torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), file=answers, flush=True)
    number = 0
    for line in sys.stdin:
        job = json.loads(line)
        answer = {}
        for phase, count in (("prefill", 1), ("decode", job["max_tokens"])):
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            names = [str(number + index) for index in range(len(job["prompts"]))]
            number += len(names)
            for name, prompt in zip(names, job["prompts"], strict=True):
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            answer[phase], tokens = run(engine, names)
            answer["tokens"] = [tokens[name] for name in names]
        print(json.dumps(answer), file=answers, flush=True)


def run(engine, names):
    """Step until all is done: [seconds, CPU seconds, tokens] of each step; each one's tokens."""
    tokens = {name: [] for name in names}
    steps = []
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = engine.step()
        elapsed = [time.perf_counter() - wall, time.process_time() - cpu]
        new = 0
        for output in outputs:
            known = list(output.outputs[0].token_ids)
            new += len(known) - len(tokens[output.request_id])
            tokens[output.request_id] = known
        steps.append([*elapsed, new])
    return steps, tokens


if __name__ == "__main__":
    main()
