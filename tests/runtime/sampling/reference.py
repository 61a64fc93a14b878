"""The distribution of the next token, spelt out token by token in float64: what the sampler is tested against."""

import math

import numpy as np


def processed(params, logits, prompt, output, end_ids=(), bad_word_ids=()):
    """Logits after the processors, in vLLM's order, as a list of floats; -inf where a token is forbidden."""
    found = [float(logit) for logit in logits]
    for token in range(len(found)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            found[token] = -math.inf
    for words in bad_word_ids:
        prefix = list(words[:-1])
        if prefix == list(output[len(output) - len(prefix) :]) and len(output) >= len(prefix):
            found[words[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in end_ids:
            found[token] = -math.inf
    for token, bias in params.logit_bias or ():
        found[token] += bias
    for token in range(len(found)):
        if token in prompt or token in output:
            found[token] = (
                found[token] / params.repetition_penalty
                if found[token] > 0
                else found[token] * params.repetition_penalty
            )
    for token in set(output):
        found[token] -= params.frequency_penalty * list(output).count(token)
        found[token] -= params.presence_penalty
    return found


def filtered(params, logits):
    """Ids that the filters keep, by the definitions over a sorted list."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    most = logits[ranked[0]]
    ranked = [token for token in ranked if logits[token] > -math.inf]
    weight = {token: math.exp((logits[token] - most) / params.temperature) for token in ranked}
    if params.min_p:
        ranked = [token for token in ranked if weight[token] >= params.min_p]
    if 0 < params.top_k < len(ranked):
        ranked = [token for token in ranked if logits[token] >= logits[ranked[params.top_k - 1]]]
    if params.top_p < 1:
        total, reached, kept = math.fsum(weight[token] for token in ranked), 0.0, []
        for token in ranked:
            kept.append(token)
            reached += weight[token]
            if reached >= params.top_p * total:
                break
        ranked = kept
    return ranked


def distribution(params, logits, prompt=(), output=(), end_ids=(), bad_word_ids=()):
    """(V,) probabilities of the next token; of temperature 0 all mass is on the most likely one."""
    logits = processed(params, logits, prompt, output, end_ids, bad_word_ids)
    found = np.zeros(len(logits))
    if params.is_greedy:
        found[logits.index(max(logits))] = 1
        return found
    kept = filtered(params, logits)
    most = max(logits)
    for token in kept:
        found[token] = math.exp((logits[token] - most) / params.temperature)
    return found / found.sum()


def joint_distribution(params, model, prompt, length, end_ids=(), bad_word_ids=()):
    """(V, …, V) probabilities of every answer of `length` tokens."""
    found = np.ones((model.vocab_size,) * length)
    for depth in range(length):
        for output in np.ndindex(*(model.vocab_size,) * depth):
            logits = model.logits([*prompt, *output])
            next_token = distribution(params, logits, prompt, list(output), end_ids, bad_word_ids)
            found[output] = (found[output].T * next_token).T
    return found
