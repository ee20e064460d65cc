package daemon

import (
	"net/http"
	"sync"
	"time"

	"github.com/erofsd/erofsd/internal/api/nydus"
)

// Limits of what [Control.Events] remembers.
const (
	maxEvents     = 500
	maxEventBytes = 51200
)

// events are the last errors that readers met.
type events struct {
	mu    sync.Mutex // guards what follows
	total int64
	size  int
	texts []string
}

// add remembers text.
func (e *events) add(text string) {
	text = time.Now().UTC().Format(http.TimeFormat) + " - " + text[:min(len(text), 4096)]
	e.mu.Lock()
	defer e.mu.Unlock()
	e.total++
	e.size += len(text)
	e.texts = append(e.texts, text)
	for len(e.texts) > maxEvents || e.size > maxEventBytes {
		e.size -= len(e.texts[0])
		e.texts = e.texts[1:]
	}
}

func (e *events) list() nydus.Events {
	e.mu.Lock()
	defer e.mu.Unlock()
	return nydus.Events{
		MaxErrors: maxEvents, TotalErrors: e.total, MaxSize: maxEventBytes, TotalSize: e.size,
		Errors: append([]string{}, e.texts...),
	}
}
