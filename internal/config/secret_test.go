package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestSecretsAreNotPrinted(t *testing.T) {
	for kind, b := range formBackends() {
		b.Type = kind
		e := BlobEntry{Type: "bootstrap", ID: "i", Image: formImage(b)}
		var out bytes.Buffer
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
			fmt.Fprintf(&out, verb+"\n", e)
			fmt.Fprintf(&out, verb+"\n", e.Image)
			for _, part := range []any{b.Registry, b.S3, b.OSS, b.HTTPProxy} {
				fmt.Fprintf(&out, verb+"\n", part)
			}
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(text)
		slog.New(slog.NewTextHandler(&out, nil)).Info("entry", "e", e, "b", b, "r", b.Registry)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("entry", "e", e, "b", b)
		for _, secret := range []string{"marker", "dXNlcjpwYXNzLW1hcmtlcg", fmt.Sprintf("%x", "marker")} {
			if strings.Contains(out.String(), secret) {
				t.Errorf("%s: %q is printed", kind, secret)
			}
		}
	}
}

func TestSecret(t *testing.T) {
	for _, c := range []struct {
		got, want string
	}{
		{fmt.Sprint(Secret("a")), "***"},
		{fmt.Sprint(Secret("")), ""},
		{fmt.Sprintf("%q %#v %x", Secret("a"), Secret(""), Secret("a")), `"***" "" ***`},
		{Secret("a").LogValue().String(), "***"},
		{Secret("a").Reveal(), "a"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

func TestUnits(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "17": 17, "1KiB": 1 << 10, "10GiB": 10 << 30, "1025MiB": 1025 << 20, "3TiB": 3 << 40} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want || s.String() != text {
			t.Errorf("size %q is %d (%v) and prints as %s", text, int64(s), err, s)
		}
	}
	for _, text := range []string{"", "-1", "1GB", "KiB", "9999999TiB", "1.5GiB", "0x10"} {
		if err := new(Size).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("size %q is accepted", text)
		}
	}
	for text, want := range map[string]time.Duration{"0s": 0, "5s": 5 * time.Second, "1m30s": 90 * time.Second} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d != Duration(want) || d.String() != text {
			t.Errorf("duration %q is %d (%v) and prints as %s", text, d, err, d)
		}
	}
	for _, text := range []string{"", "5", "-5s", "1d", "1000000h"} {
		if err := new(Duration).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("duration %q is accepted", text)
		}
	}
}
