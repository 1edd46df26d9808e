"""Streams one chat answer from a Headrace gateway, and shows what a refusal says.

python generate.py ADDRESS PROMPT [MAX_TOKENS]
"""

import sys

import headrace
from headrace.errors import HeadraceError


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    address, prompt = sys.argv[1:3]
    max_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 16
    messages = [{"role": "user", "content": prompt}]
    with headrace.Client(address, timeout_s=60) as client:
        try:
            # Leaving the block cancels what is not over.
            with client.stream(messages, max_tokens=max_tokens) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
        except HeadraceError as error:
            print(
                f"{type(error).__name__}: {error} (field {error.field or '-'}, "
                f"retry after {error.retry_after_ms} ms)",
                file=sys.stderr,
            )
            return 1
    usage = delta.usage
    print(f"\n{usage.prompt_tokens} + {usage.completion_tokens} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
