package config

import (
	"encoding"
	"errors"
	"strconv"
	"strings"
	"time"
)

var (
	_ encoding.TextUnmarshaler = (*Size)(nil)
	_ encoding.TextUnmarshaler = (*Duration)(nil)
)

// Size is a number of bytes. As text it is "10GiB", "512KiB" or a plain number.
type Size int64

func sizeUnits() []string { return []string{"KiB", "MiB", "GiB", "TiB"} }

// UnmarshalText reads a size; it is never negative.
func (s *Size) UnmarshalText(text []byte) error {
	number, shift := string(text), 0
	for i, unit := range sizeUnits() {
		if rest, ok := strings.CutSuffix(number, unit); ok {
			number, shift = rest, 10*(i+1)
			break
		}
	}
	v, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || v < 0 || v > 1<<62>>shift {
		return errors.New("want a size as 10GiB, 512KiB or a number of bytes")
	}
	*s = Size(v << shift)
	return nil
}

// MarshalText writes the size in the largest unit that holds it exactly.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Size) String() string {
	unit := ""
	for _, u := range sizeUnits() {
		if s == 0 || s%1024 != 0 {
			break
		}
		s, unit = s/1024, u
	}
	return strconv.FormatInt(int64(s), 10) + unit
}

// Duration is a time span. As text it is "5s" or "1m30s", never negative; in nydus's
// forms it is a number of seconds.
type Duration time.Duration

// maxDuration bounds what somebody may ask to wait for.
const maxDuration = Duration(100 * 365 * 24 * time.Hour)

// UnmarshalText reads a duration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 || Duration(v) > maxDuration {
		return errors.New("want a duration as 5s or 1m30s")
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the duration as [time.Duration] does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

func (d Duration) String() string { return time.Duration(d).String() }
