package keychain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// A Login is what a registry wants to see. The zero value is none.
type Login struct {
	Username string
	Password string // with an empty Username it is a bearer token

	// Docker: docker's configuration has the login, and it is not copied: who reads the
	// image is to ask docker, as long as the login is needed.
	Docker bool

	Until time.Time // when it is to be asked for again; zero: not known
}

// Empty reports whether there is no login.
func (l Login) Empty() bool { return l.Password == "" && !l.Docker }

// Format prints nothing of the login, whatever the verb.
func (l Login) Format(f fmt.State, _ rune) { io.WriteString(f, "[login]") }

// LogValue logs nothing of the login.
func (l Login) LogValue() slog.Value { return slog.StringValue("[login]") }

// MarshalJSON refuses: a login is written nowhere.
func (Login) MarshalJSON() ([]byte, error) {
	return nil, errors.New("a login is not written")
}

// A Provider knows logins. Its methods are safe for concurrent use.
type Provider interface {
	// Name is what people call it.
	Name() string
	// Login returns the login for an image, host/repository:tag; an empty one when there
	// surely is none. The error says why the provider does not know, and has no secrets;
	// [ErrForgotten] is no failure.
	Login(ctx context.Context, image string) (Login, error)
	// Refused says that a registry refused the login for an image: Login is to look anew.
	Refused(image string)
}

// ErrForgotten says that a provider has heard of no login, but may have before it was
// started.
var ErrForgotten = errors.New("no login is remembered")

// providerTime is how long a provider may take.
const providerTime = time.Minute

// A Chain asks its providers in their order. It is safe for concurrent use.
type Chain struct {
	providers []Provider
	log       *slog.Logger
}

// New returns a chain. Failures of providers are logged.
func New(log *slog.Logger, providers ...Provider) *Chain {
	return &Chain{providers: providers, log: log}
}

// Login returns the first login for an image that a provider has. If none has one, sure says
// whether there is none: a provider that fails, or may have forgotten, cannot say.
func (c *Chain) Login(ctx context.Context, image string) (l Login, sure bool) {
	sure = true
	for _, p := range c.providers {
		l, err := c.ask(ctx, p, image)
		if err == nil && !l.Empty() {
			return l, true
		}
		if err == nil {
			continue
		}
		sure = false
		if !errors.Is(err, ErrForgotten) && ctx.Err() == nil {
			c.log.Warn("ask for the login of an image", "provider", p.Name(), "image", image, "err", err)
		}
	}
	return Login{}, sure
}

func (c *Chain) ask(ctx context.Context, p Provider, image string) (Login, error) {
	ctx, cancel := context.WithTimeout(ctx, providerTime)
	defer cancel()
	return p.Login(ctx, image)
}

// Refused says that a registry refused the login for an image.
func (c *Chain) Refused(image string) {
	for _, p := range c.providers {
		p.Refused(image)
	}
}

// signal tells whoever waits at changed; it does not wait itself.
func signal(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default: // nobody is told, or is about to look
	}
}
