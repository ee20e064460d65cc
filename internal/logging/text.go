package logging

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strconv"
	"syscall"
	"time"
	"unicode"
)

// timeFormat is nydusd's; times are UTC.
const timeFormat = "2006-01-02 15:04:05.000000 -07:00"

// noLevel marks the level that slog's handler would write.
const noLevel = slog.Level(math.MinInt32)

// A textHandler writes nydusd's lines: [time] LEVEL message key=value. One record is one
// line. slog's own text handler writes the attributes; the rest travels as its message,
// which reshape takes out of its quotes again.
type textHandler struct {
	inner   slog.Handler
	level   slog.Leveler
	journal bool // the journal adds times and wants priorities (sd-daemon(3))
}

func newTextHandler(w io.Writer, level slog.Leveler, journal bool) slog.Handler {
	drop := func(groups []string, a slog.Attr) slog.Attr {
		if l, ok := a.Value.Any().(slog.Level); ok && l == noLevel && len(groups) == 0 && a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}
	inner := slog.NewTextHandler(reshape{w}, &slog.HandlerOptions{Level: noLevel, ReplaceAttr: drop})
	return &textHandler{inner, level, journal}
}

func (h *textHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *textHandler) Handle(ctx context.Context, r slog.Record) error {
	at := r.Time
	if at.IsZero() {
		at = time.Now()
	}
	head := "[" + at.UTC().Format(timeFormat) + "] "
	if h.journal {
		head = fmt.Sprintf("<%d>", priority(r.Level))
	}
	line := slog.NewRecord(time.Time{}, noLevel, head+levelName(r.Level)+" "+r.Message, 0)
	r.Attrs(func(a slog.Attr) bool {
		line.AddAttrs(a)
		return true
	})
	return h.inner.Handle(ctx, line)
}

func (h *textHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &textHandler{h.inner.WithAttrs(attrs), h.level, h.journal}
}

func (h *textHandler) WithGroup(name string) slog.Handler {
	return &textHandler{h.inner.WithGroup(name), h.level, h.journal}
}

// priority is syslog's number of a level.
func priority(l slog.Level) int {
	switch {
	case l >= slog.LevelError:
		return 3
	case l >= slog.LevelWarn:
		return 4
	case l >= slog.LevelInfo:
		return 6
	}
	return 7
}

// reshape takes the message out of what slog's text handler writes, msg="…" key=value.
// It always has spaces, so it is always quoted.
type reshape struct{ w io.Writer }

func (r reshape) Write(p []byte) (int, error) {
	rest, found := bytes.CutPrefix(p, []byte("msg="))
	quoted, err := strconv.QuotedPrefix(string(rest))
	if !found || err != nil {
		return r.w.Write(p)
	}
	message, err := strconv.Unquote(quoted)
	if err != nil {
		return r.w.Write(p)
	}
	line := make([]byte, 0, len(p))
	for _, c := range message {
		if unicode.IsPrint(c) {
			line = append(line, string(c)...)
			continue
		}
		escaped := strconv.QuoteRune(c)
		line = append(line, escaped[1:len(escaped)-1]...)
	}
	if _, err := r.w.Write(append(line, rest[len(quoted):]...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// readByJournal reports whether w is what systemd has connected to the journal.
func readByJournal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
