"""The elements of an HTML page."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page, its texts, and its references to other files."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.outside, self.texts, self._open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        for key, value in attributes:
            if key in ('src', 'href', 'xlink:href') and not value.startswith(('#', 'data:')):
                self.outside.append(value)

    def handle_data(self, data):
        if not {'style', 'title'} & {*self._open[-1:]}:
            self.texts.append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
