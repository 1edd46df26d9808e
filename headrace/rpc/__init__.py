"""gRPC as our services use it: long-lived streams that carry many requests.

`options` are the measured settings, `server` starts a server, `calls` carries
many calls on one stream (tokenizer, router), `frames` is the arithmetic of
resumable streams (worker), `errors` puts our errors on the wire.
"""
