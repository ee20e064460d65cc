package logging

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strings"
)

// LevelTrace is below debug, as nydusd has it.
const LevelTrace = slog.LevelDebug - 4

// levelOff is above every record.
const levelOff = slog.Level(math.MaxInt32)

// Options says what is logged and where; the zero value is text of level info to
// standard error.
type Options struct {
	Level        string    // off, error, warn, info, debug or trace, in any case; "": info
	Format       string    // text or json; "": text
	File         string    // appended to; .log is added to a name without extension. "": Out
	RotationSize int64     // bytes of File after which a new one is begun; 0: never
	Keep         int       // rotated files that are kept; 0: 10
	Out          io.Writer // nil: standard error
}

// A Logger is a [slog.Logger] whose level can be changed and whose records never wait.
// It is safe for concurrent use.
type Logger struct {
	*slog.Logger
	level slog.LevelVar
	queue *queue
}

// New returns a logger, which owns a goroutine until it is closed. A file that cannot be
// opened is an error; what happens to it later is not.
func New(o Options) (*Logger, error) {
	l := &Logger{}
	if o.Level == "" {
		o.Level = "info"
	}
	if err := l.SetLevel(o.Level); err != nil {
		return nil, err
	}
	if o.Out == nil {
		o.Out = os.Stderr
	}
	json := strings.EqualFold(o.Format, "json")
	if !json && o.Format != "" && !strings.EqualFold(o.Format, "text") {
		return nil, fmt.Errorf("log format %q: want text or json", o.Format)
	}
	l.queue = newQueue()
	var out sink = stream{o.Out}
	if o.File != "" {
		f, err := openFile(o, func(err error) { l.Warn("a rotated log file stays as it is", "err", err) })
		if err != nil {
			return nil, err
		}
		out = f
	}
	journal := o.File == "" && readByJournal(o.Out)
	handler := func(w io.Writer) slog.Handler {
		if json {
			return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: &l.level, ReplaceAttr: nameLevel})
		}
		return newTextHandler(w, &l.level, journal)
	}
	l.Logger = slog.New(handler(l.queue))
	l.queue.start(out, func(w io.Writer, lost int64, err error) {
		var why []any
		if err != nil {
			why = []any{"err", err}
		}
		slog.New(handler(w)).With("records", lost).Warn("log records were lost", why...)
	})
	return l, nil
}

// SetLevel changes what is logged from now on. The name is one of Options.Level.
func (l *Logger) SetLevel(name string) error {
	level, err := ParseLevel(name)
	if err == nil {
		l.level.Set(level)
	}
	return err
}

// Level is the name of the present level.
func (l *Logger) Level() string { return strings.ToLower(levelName(l.level.Level())) }

// Lost is the number of records that were lost since the start.
func (l *Logger) Lost() int64 { return l.queue.lost.Load() }

// Close writes what is in the queue and closes the file, if any. Records after it are
// lost. When ctx ends first, writing goes on behind it, and the error says so. It can be
// called again.
func (l *Logger) Close(ctx context.Context) error { return l.queue.close(ctx) }

// ParseLevel returns the level of that name, in any case.
func ParseLevel(name string) (slog.Level, error) {
	for _, level := range []slog.Level{levelOff, slog.LevelError, slog.LevelWarn, slog.LevelInfo, slog.LevelDebug, LevelTrace} {
		if strings.EqualFold(name, levelName(level)) {
			return level, nil
		}
	}
	return 0, fmt.Errorf("log level %q: want off, error, warn, info, debug or trace", name)
}

// levelName is nydusd's name of a level, or of the next one below that has a name.
func levelName(l slog.Level) string {
	switch {
	case l >= levelOff:
		return "OFF"
	case l >= slog.LevelError:
		return "ERROR"
	case l >= slog.LevelWarn:
		return "WARN"
	case l >= slog.LevelInfo:
		return "INFO"
	case l >= slog.LevelDebug:
		return "DEBUG"
	}
	return "TRACE"
}

// nameLevel puts our names of the levels into JSON.
func nameLevel(groups []string, a slog.Attr) slog.Attr {
	if level, ok := a.Value.Any().(slog.Level); ok && len(groups) == 0 && a.Key == slog.LevelKey {
		a.Value = slog.StringValue(levelName(level))
	}
	return a
}
