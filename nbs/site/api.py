"""The reference of a module, read from its source: signatures, docstrings, and the comments that
stand beside parameters. Nothing is imported, so the site needs no torch."""
import ast, io, re, tokenize

INDENT = 10 # colons around a class; what it holds has fewer


def escaped(text):
    "Keep Markdown from reading a comment as markup, outside of its code"
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p[:1] == "`" else re.sub(r"([*_\[\]<>${}|~])", r"\\\1", p) for p in parts)

def comments_of(source):
    "Find the comment at the end of each line"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

def parameters(function):
    a = function.args
    starred = [x for x in (a.vararg, a.kwarg) if x]
    return [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *starred)
        if x.arg not in ("self", "cls")]

def documented(function, comments):
    "Give the comment of each parameter, and the one of what comes back"
    found, head = {}, function.body[0].lineno
    last = function.returns.end_lineno if function.returns else None
    by_line = {}
    for x in parameters(function): by_line.setdefault(x.end_lineno, []).append(x.arg)
    for line, names in by_line.items():
        text = comments.get(line)
        if not text or line in (head, last): continue
        if line == function.lineno and text.partition(":")[0] not in names: # of a one-line head
            last = line
            continue
        found |= dict.fromkeys(names if text.endswith(" each") else names[-1:], text)
    return found, comments.get(last) if last != head else None

def fields(found, types, returned=None):
    lines = [f":param {name}: {escaped(text)}" for name, text in found.items()]
    lines += [f":type {name}: {types[name]}" for name in found if types.get(name)]
    return lines + ([f":returns: {escaped(returned)}"] if returned else [])

def directive(kind, signature, lines, depth, *options):
    fence = ":" * (INDENT - depth)
    return [f"{fence}{{py:{kind}}} {signature}", *options, "", *lines, "", fence, ""]

def types_of(function):
    return {x.arg: ast.unparse(x.annotation) for x in parameters(function) if x.annotation}

def signature(function):
    "Write the parameters as a reader passes them: without self"
    bare = ast.parse("def f(): pass").body[0]
    bare.args, first = function.args, [*function.args.posonlyargs, *function.args.args][:1]
    text = ast.unparse(bare.args)
    if first and first[0].arg in ("self", "cls"):
        text = re.sub(r"^(self|cls)(: *\w+)?(, *)?", "", text)
    return f"({text})" + (f" -> {ast.unparse(function.returns)}" if function.returns else "")

def function(node, comments, depth=1, name=None, kind="function", *options):
    found, returned = documented(node, comments)
    text = [ast.get_docstring(node) or "", "", *fields(found, types_of(node), returned)]
    return directive(kind, (name or node.name) + signature(node), text, depth, *options)

def is_data(node): # a class whose annotations are its parameters
    words = {ast.unparse(x).partition("(")[0] for x in (*node.decorator_list, *node.bases)}
    return bool(words & {"dataclass", "NamedTuple", "Struct", "msgspec.Struct"})

def methods(node, comments, added):
    "Document what a class does, what is assigned to it further down included"
    for x in node.body:
        if not isinstance(x, ast.FunctionDef) or x.name.startswith("_"): continue
        words = {ast.unparse(d).partition("(")[0] for d in x.decorator_list}
        if words & {"property", "cached_property"}:
            kind = [f":type: {ast.unparse(x.returns)}"] if x.returns else []
            _, returned = documented(x, comments)
            text = ast.get_docstring(x) or escaped(returned or "")
            yield from directive("property", x.name, [text], 2, *kind)
            continue
        static = [f":{w}:" for w in ("staticmethod", "classmethod") if w in words]
        yield from function(x, comments, 2, None, "method", *static)
    for name, made, static in added:
        options = [":staticmethod:"] if static else []
        yield from function(made, comments, 2, name, "method", *options)

def class_(node, comments, added):
    held = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    start = [x for x in node.body if getattr(x, "name", "") == "__init__"]
    found, types, text = {}, {}, node.name
    if start:
        found, _ = documented(start[0], comments)
        types, text = types_of(start[0]), node.name + signature(start[0])
    elif is_data(node):
        types = {x.target.id: ast.unparse(x.annotation) for x in held}
        found = {x.target.id: comments.get(x.end_lineno, "") for x in held}
        text += f"({', '.join(ast.unparse(x) for x in held)})"
    lines = [ast.get_docstring(node) or "", "", *fields(found, types), ""]
    return directive("class", text, [*lines, *methods(node, comments, added)], 0)

def assigned(tree):
    "Find methods that a module assigns to its classes: {class: [(name, function, static)]}"
    functions = {x.name: x for x in tree.body if isinstance(x, ast.FunctionDef)}
    found = {}
    for x in tree.body:
        if not isinstance(x, ast.Assign) or not isinstance(x.targets[0], ast.Attribute): continue
        call = isinstance(x.value, ast.Call)
        made = functions.get(getattr(x.value.args[0] if call else x.value, "id", None))
        if made: found.setdefault(ast.unparse(x.targets[0].value), []).append(
            (x.targets[0].attr, made, call))
    return found

def values(node):
    "Find what an assignment names: {name: value}"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    target, value = targets[0], node.value
    if not isinstance(target, ast.Tuple): return {ast.unparse(target): value}
    parts = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
    return dict(zip(map(ast.unparse, target.elts), parts))

def constant(name, value, comment):
    "Document a constant that is exported"
    text = ast.unparse(value) if value else ""
    short = [f"`{text}`"] if 0 < len(text) <= 80 and "`" not in text else []
    return directive("data", name, [escaped(comment), "", *short], 1)

def reference(module, source, page, title):
    "Write the reference of a module as a page of MyST Markdown"
    tree, comments = ast.parse(source), comments_of(source)
    exported = next(
        (ast.literal_eval(x.value) for x in tree.body
            if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__"), [])
    promise, _, convention = (ast.get_docstring(tree) or "").partition("\n")
    lines = [f"# {module}", "", f"> {promise}", "", convention.strip(), "",
        f"The code, its reasons and its lessons: [{title}]({page}).", "",
        f"```{{py:module}} {module}", "```", ""]
    added = assigned(tree)
    defined = {getattr(x, "name", None) for x in tree.body} # a function may be wrapped further down
    for x in tree.body:
        if isinstance(x, (ast.Assign, ast.AnnAssign)):
            comment = comments.get(x.lineno, "")
            for name, value in values(x).items():
                if name in exported and name not in defined:
                    lines += constant(name, value, comment)
        elif getattr(x, "name", None) not in exported: continue
        elif isinstance(x, ast.FunctionDef): lines += function(x, comments)
        else: lines += class_(x, comments, added.get(x.name, []))
    return "\n".join(lines) + "\n"
