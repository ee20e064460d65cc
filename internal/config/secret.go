package config

import (
	"encoding"
	"fmt"
	"io"
	"log/slog"
	"strconv"
)

var (
	_ fmt.Formatter          = Secret("")
	_ fmt.GoStringer         = Secret("")
	_ encoding.TextMarshaler = Secret("")
	_ slog.LogValuer         = Secret("")
)

// hidden is shown in the place of a secret.
const hidden = "***"

// A Secret is a text that nothing prints: fmt, encoding/json and log/slog show three
// stars, or nothing when it is empty. Only [Secret.Reveal] gives it.
type Secret string

// Reveal returns the secret itself, for whoever sends it.
func (s Secret) Reveal() string { return string(s) }

func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// GoString is what %#v shows.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// Format keeps every verb, also %x, from the secret.
func (s Secret) Format(f fmt.State, verb rune) {
	text := s.String()
	if verb == 'q' || verb == 'v' && f.Flag('#') {
		text = s.GoString()
	}
	_, _ = io.WriteString(f, text)
}

// MarshalText keeps encoders (JSON's too) from the secret.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue keeps log/slog from the secret.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }
