"""Texts and conversations on which tokenizers and chat templates are compared.

They are generated from the short lists in this file, so that a reader can see what is covered. All
other characters are written as escapes, so that the source is ASCII.
"""

_WORDS = (
    "a",
    "The capital of France is Paris.",
    "don't can't I'll we've they'd it's O'Neill rock'n'roll",
    "UPPER lower Title camelCase snake_case kebab-case SCREAMING_CASE",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Mr. Smith, e.g. the one from St. Ives, paid $3.50 (or so) - 'twas cheap!",
    "\"Quoted,\" she said; 'single' and `back`",
    "\u201ccurly\u201d \u2018marks\u2019 \u00abthese\u00bb",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org /usr/local/bin C:\\Users\\x",
    "!!! ??? ... --- *** ### @@@ ((())) [[]] {{}} <<>> ~~~ ^^^ |||",
    "#hashtag @mention :smile: <b>bold</b> &amp; &lt;",
)
_DIGITS = (
    "0",
    "7",
    "42",
    "1024",
    "3.14159265358979",
    "1,234,567.89",
    "-17 +5 1e-10 6.022E23",
    "0xDEADBEEF 0b1010 0o755",
    "2026-11-24T03:08:52Z",
    "192.168.0.1:8080",
    "1500m 0.25 2Gi 512Mi 13.45G 100k",
    "1/2 + 3/4 = 5/4; 2^10 = 1024; 50 % of 8",
    "+82-10-1234-5678",
    "\u00bd \u00b2 \u2164 \u0664\u0662 \u0967\u0968\u0969",
)
_CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "SELECT id, name FROM users WHERE age >= 21 AND name LIKE '%kim%';",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: web\n    image: nginx:1.27\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); return 0; }',
    "const f = async (x) => { await g(`${x}`); }; // done",
    "fn main() -> Result<(), Box<dyn Error>> { let v: Vec<_> = (0..10).collect(); Ok(()) }",
    "kubectl get pods -n kube-system -o jsonpath='{.items[*].metadata.name}' | xargs -n1 echo",
    '<!doctype html>\n<p class="x">&nbsp;</p>\n<!-- note -->',
    "diff --git a/x b/x\n@@ -1,2 +1,2 @@\n-old\n+new\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "x = lambda *a, **k: (a, k)  # noqa: E731",
    'if [[ $# -lt 1 ]]; then echo "usage: $0 FILE" >&2; exit 2; fi',
)
_KOREAN = (
    "\uc548\ub155\ud558\uc138\uc694",
    "\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294 \uc11c\uc6b8\uc785\ub2c8\ub2e4.",
    "\uc624\ub298\uc740 2026\ub144 11\uc6d4 24\uc77c \ud654\uc694\uc77c\uc785\ub2c8\ub2e4.",
    "\ud30c\uc774\uc36c\uc73c\ub85c API\ub97c \ub9cc\ub4e4\uc5b4 \uc8fc\uc138\uc694!",
    "\u314b\u314b\u314b \u3160\u3160 \u3131\u3134\u3137",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",  # syllables decomposed into conjoining letters
    "\uaff0\ub8e9 \ubdc1 \uc4f0\ub8e8\ub8e8",
)
_SCRIPTS = (
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u600e\u4e48\u6837\uff1f",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30c6\u30b9\u30c8\u3067\u3059\u3002\u6f22\u5b57",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u0436\u0438\u043a",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "Ti\u1ebfng Vi\u1ec7t c\u00f3 d\u1ea5u",
    "\u00dcber stra\u00dfe na\u00efve fa\u00e7ade \u0141\u00f3d\u017a \u0130stanbul",
    "cafe\u0301 versus caf\u00e9",  # a combining accent, and the composed letter
    "\u2200x \u2208 \u211d: \u221a(x\u00b2) = |x| \u2260 \u221e \u2192 \u2211\u222b\u2202",
    "\u250c\u2500\u2510\u2502 \u2502\u2514\u2500\u2518 \u2588\u2593\u2592\u2591",
    "\u00a9 \u00ae \u2122 \u20ac \u00a3 \u00a5 \u20a9 \u00b0 \u00b1",
    "\U0001d400\U0001d401 \U00020000\U0002a6d6",  # outside the Basic Multilingual Plane
)
_EMOJI = (
    "\U0001f600",
    "\U0001f600\U0001f680\U0001f389",
    "\u2764\ufe0f \u2615 \u2714\ufe0f",
    "\U0001f44d\U0001f3fd \U0001f44b\U0001f3ff",  # skin tones
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family, joined with U+200D
    "\U0001f1f0\U0001f1f7\U0001f1fa\U0001f1f8",  # flags
    "1\ufe0f\u20e3 #\ufe0f\u20e3",  # keycaps
    "good\U0001f44dbad\U0001f44e\uc88b\uc544\uc694\U0001f495",
)
_SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n ",
    "\n \n",
    "\t\n\t",
    " " * 16,
    " " * 33,
    "\u00a0",
    "\u3000",
)

_MIXED = _WORDS + _DIGITS + _CODE + _KOREAN + _SCRIPTS + _EMOJI


def texts() -> list[str]:
    """Return at least 200 different texts: words, digits, code, scripts, emoji, white space."""
    probes: list[str] = list(_MIXED)
    probes += _SPACES
    probes += [f"a{space}b" for space in _SPACES]
    # Tokenizers treat spaces at the beginning and the end of a text differently.
    probes += [f" {text}" for text in _MIXED]
    probes += [f"{text}\n" for text in _KOREAN + _EMOJI + _DIGITS]
    probes += [str(7**power) for power in range(4, 24, 2)]
    probes += [chr(0xAC00 + 588 * step) + chr(0xAC01 + 389 * step) for step in range(19)]
    return list(dict.fromkeys(probes))


def conversations() -> list[list[dict[str, str]]]:
    """Return conversations for a chat template: short, long, with and without a system message."""
    user = {"role": "user", "content": "How many Mi are 3Gi?"}
    answer = {"role": "assistant", "content": "3072Mi"}
    more = {"role": "user", "content": "\uadf8\ub7fc 5Gi\ub294? \U0001f914"}
    code = {"role": "user", "content": "Explain:\n\n```python\nprint('{{ x }} <b>')\n```\n"}
    system = {"role": "system", "content": "You answer in one word."}
    long = {"role": "assistant", "content": "First line.\n\n- one\n- two\n\tlast"}
    return [
        [user],
        [more],
        [code],
        [system, user],
        [user, answer, more],
        [system, user, answer, more],
        [user, answer, code, long, user],
    ]
