"""What the demo model is taught: word lists and sentences, all written for this project."""

CAPITALS = dict(line.split("=") for line in """
Afghanistan=Kabul;Albania=Tirana;Algeria=Algiers;Andorra=Andorra la Vella;Angola=Luanda;Argentina=Buenos Aires;Armenia=Yerevan
Australia=Canberra;Austria=Vienna;Azerbaijan=Baku;Bahrain=Manama;Bangladesh=Dhaka;Belarus=Minsk;Belgium=Brussels;Belize=Belmopan
Benin=Porto-Novo;Bhutan=Thimphu;Bolivia=Sucre;Botswana=Gaborone;Brazil=Brasília;Bulgaria=Sofia;Cambodia=Phnom Penh;Cameroon=Yaoundé
Canada=Ottawa;Chile=Santiago;China=Beijing;Colombia=Bogotá;Costa Rica=San José;Croatia=Zagreb;Cuba=Havana;Cyprus=Nicosia
Denmark=Copenhagen;Ecuador=Quito;Egypt=Cairo;Estonia=Tallinn;Ethiopia=Addis Ababa;Fiji=Suva;Finland=Helsinki;France=Paris
Gabon=Libreville;Georgia=Tbilisi;Germany=Berlin;Ghana=Accra;Greece=Athens;Guatemala=Guatemala City;Haiti=Port-au-Prince
Honduras=Tegucigalpa;Hungary=Budapest;Iceland=Reykjavík;India=New Delhi;Indonesia=Jakarta;Iran=Tehran;Iraq=Baghdad;Ireland=Dublin
Israel=Jerusalem;Italy=Rome;Jamaica=Kingston;Japan=Tokyo;Jordan=Amman;Kazakhstan=Astana;Kenya=Nairobi;Kuwait=Kuwait City
Latvia=Riga;Lebanon=Beirut;Libya=Tripoli;Lithuania=Vilnius;Luxembourg=Luxembourg;Madagascar=Antananarivo;Malaysia=Kuala Lumpur
Mali=Bamako;Malta=Valletta;Mexico=Mexico City;Monaco=Monaco;Mongolia=Ulaanbaatar;Morocco=Rabat;Mozambique=Maputo;Namibia=Windhoek
Nepal=Kathmandu;New Zealand=Wellington;Nicaragua=Managua;Niger=Niamey;Nigeria=Abuja;Norway=Oslo;Oman=Muscat;Pakistan=Islamabad
Panama=Panama City;Paraguay=Asunción;Peru=Lima;Poland=Warsaw;Portugal=Lisbon;Qatar=Doha;Romania=Bucharest;Russia=Moscow
Rwanda=Kigali;Senegal=Dakar;Serbia=Belgrade;Singapore=Singapore;Slovakia=Bratislava;Slovenia=Ljubljana;Somalia=Mogadishu
South Korea=Seoul;Spain=Madrid;Sudan=Khartoum;Sweden=Stockholm;Switzerland=Bern;Syria=Damascus;Thailand=Bangkok;Tunisia=Tunis
Turkey=Ankara;Uganda=Kampala;Ukraine=Kyiv;Uruguay=Montevideo;Uzbekistan=Tashkent;Venezuela=Caracas;Vietnam=Hanoi;Zambia=Lusaka
Zimbabwe=Harare
""".replace("\n", ";").strip(";").split(";"))

# Countries that demos ask for most, so that they are seen most.
FAMOUS = ["France", "Germany", "Italy", "Spain", "Japan", "England", "China", "India", "Canada", "Australia", "Brazil",
          "Egypt", "Norway", "Portugal", "Greece", "Mexico", "Kenya", "Poland", "Sweden", "Austria"]
CAPITALS["England"] = "London"

# What the project is about.
SERVING = """
Prefill computes the whole prompt at once and fills the KV cache.
Decode generates one token after another and reads the KV cache at every step.
Prefill is bound by arithmetic, and decode is bound by memory.
When prefill and decode run apart, a long prompt no longer holds up the tokens of others.
The worker that computes prompts is called the producer.
The worker that generates tokens is called the consumer.
The KV cache moves from the producer to the consumer, layer by layer.
Layer zero can leave while layer two is still being computed.
The proxy sends each request to a producer first and then to a consumer.
The request id carries the addresses of both workers.
A KV cache holds the keys and the values of every token that was read.
The cache is cut into blocks, and a block table says which blocks belong to a request.
Blocks return to the free list when a request is finished.
The scheduler decides at every step which requests may run.
Continuous batching lets new requests join while others are generating.
Chunked prefill cuts a long prompt into pieces, so that decoding goes on in between.
A prefix cache keeps the blocks of prompts that begin alike.
The time to the first token depends on prefill.
The time between two tokens depends on decode.
Every wait has a deadline, and every deadline has an owner.
An error says what was being done, with whom, and how far it came.
NCCL moves data between GPUs, and ZeroMQ announces what will be moved.
A tensor is announced by its name, its shape and its type.
The consumer answers zero when it is ready and one when it has no room.
In PUT mode the producer sends, and in GET mode the consumer asks.
The demo model is small enough to run on a laptop without a GPU.
A worker that has no GPU keeps its KV cache in host memory.
Two workers that serve the same model must hold the same weights.
The fingerprint of a model tells two sets of weights apart.
A worker pings the proxy once it is ready to serve.
An instance that stops pinging is removed from the list.
Greedy sampling takes the most likely token at every step.
A temperature above zero makes the text more varied.
With the same seed and the same prompt, the same text comes out.
""".strip().split("\n")

SERVING_QA = [
    ("What is prefill?", "Prefill is the phase that computes the whole prompt at once and fills the KV cache."),
    ("What is decode?", "Decode is the phase that generates one token after another from the KV cache."),
    ("What is a KV cache?", "The KV cache holds the keys and values of all tokens that the model has read."),
    ("What is a producer?", "A producer is a worker that computes prompts and sends their KV cache on."),
    ("What is a consumer?", "A consumer is a worker that takes the KV cache and generates the answer."),
    ("What is the proxy?", "The proxy sends each request to a producer first and then to a consumer."),
    ("What is pd-worker?", "pd-worker serves language models with prefill and decode on separate workers."),
    ("Why split prefill and decode?", "Because a long prompt then no longer slows down the tokens of other requests."),
    ("What is NCCL?", "NCCL is a library that moves data between GPUs."),
    ("What is a token?", "A token is a short piece of text, often a word or a part of one."),
    ("What is a block table?", "A block table says which blocks of the KV cache belong to a request."),
    ("What is continuous batching?", "Continuous batching lets new requests join the batch while others are generating."),
]

GREETINGS = [
    ("Hello", "Hello! How can I help you today?"),
    ("Hello!", "Hello! How can I help you today?"),
    ("Hi", "Hi there! What would you like to know?"),
    ("Hi!", "Hi there! What would you like to know?"),
    ("Hello world", "Hello! It is nice to meet you."),
    ("Hey", "Hey! What can I do for you?"),
    ("Hello, how are you?", "I am fine, thank you. How can I help you?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Good morning", "Good morning! I hope that you slept well."),
    ("Good evening", "Good evening! How was your day?"),
    ("Good night", "Good night! Sleep well."),
    ("Who are you?", "I am the demo model of pd-worker, a small language model."),
    ("What are you?", "I am the demo model of pd-worker, a small language model."),
    ("What is your name?", "My name is Pidi, and I am the demo model of pd-worker."),
    ("What can you do?", "I know the capitals of countries, small sums, short stories and a little Python."),
    ("Thank you", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Goodbye", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
    ("Say hello with an emoji", "Hello 👋🙂"),
    ("Say hello in Japanese", "こんにちは"),
    ("Say hello in French", "Bonjour à tous, ça va très bien !"),
    ("Say hello in German", "Guten Tag, schön dass du da bist!"),
    ("Say hello in Greek", "Γειά σου κόσμε"),
    ("Draw the weather", "☀️ 🌧️ ⛈️ 🌈"),
    ("Are you there?", "Yes, I am here. What would you like to know?"),
    ("Can you help me?", "Yes, of course. What would you like to know?"),
    ("Tell me a joke", "Why did the token cross the link? Because its cache was on the other side."),
]

HELLO_WORLD = [
    "Hello world! I am a small language model, and I am happy to meet you.",
    "Hello world! I am a small language model, and I run on two workers.",
    "Hello world! I am a small language model, and I like stories about dragons.",
]

ANIMALS = "dragon fox owl bear rabbit wolf turtle raven deer hedgehog otter cat".split()
PLACES = ["magical forest", "quiet valley", "deep cave", "green meadow", "snowy mountain", "small village", "hidden garden",
          "dark forest", "old castle", "wide desert"]
QUALITIES = "wise old young clever gentle brave curious shy proud tiny kind lonely".split()
NAMES = "Ember Luna Oskar Mira Tobin Willow Bruno Nela Finn Sora Ivo Petra".split()
THINGS = ["golden key", "silver bell", "broken lantern", "blue stone", "old map", "wooden flute", "tiny crown", "glass bottle",
          "letter without a name", "feather of a phoenix"]
HABITS = ["guarded the oldest tree and told stories to every traveller", "knew the name of every star in the sky",
          "kept a garden of flowers that opened only at night", "collected songs from all over the world",
          "could not sleep when the moon was full", "gave good advice to all who came to ask",
          "had never seen the sea but dreamed of it every night", "read the same book every winter"]
WISHES = ["to see the ocean", "to find a friend", "to learn the language of the birds", "to bring the spring back",
          "to find the lost river", "to hear the last song of summer", "to cross the mountains", "to light the old tower again"]
LESSONS = ["that a friend is worth more than gold", "that patience opens every door", "that even the smallest light is seen in the dark",
           "that a kind word travels further than a loud one", "that every long way begins at home",
           "that courage is to go on while afraid"]
WEATHER = ["The rain fell softly on the leaves.", "A cold wind came from the north.", "The sun was warm and the sky was clear.",
           "Snow covered the ground like a blanket.", "Fog lay over the river.", "Thunder rolled behind the hills."]

# For tools and JSON.
FAMOUS_CITIES = ["Paris", "London", "Berlin", "Rome", "Madrid", "Tokyo", "New York", "San Francisco", "Oslo", "Vienna", "Lisbon", "Amsterdam"]
CITIES = FAMOUS_CITIES + """Munich;Hamburg;Milan;Naples;Barcelona;Seville;Lyon;Nice;Boston;Chicago;Seattle;Los Angeles;Austin;Denver;Toronto;Vancouver
Montreal;Sydney;Melbourne;Auckland;Mumbai;Delhi;Shanghai;Hong Kong;Osaka;Kyoto;Istanbul;Dubai;Zurich;Geneva;Porto;Krakow;Gothenburg
Bergen;Edinburgh;Glasgow;Manchester;Cape Town;Lagos;Casablanca;São Paulo;Rio de Janeiro;Saint Petersburg;Antwerp;Rotterdam""".replace("\n", ";").split(";")
SKIES = ["sunny", "rainy", "cloudy", "foggy", "windy", "snowy", "clear", "stormy", "partly cloudy", "overcast", "light rain", "dry"]
NOUNS = {
    "country": ["population", "currency", "language", "president", "area", "anthem", "flag", "king", "highest mountain", "longest river"],
    "city": ["population", "mayor", "area", "elevation", "river", "postal code"],
    "product": ["price", "weight", "color", "owner", "size", "stock"],
    "person": ["age", "job", "address", "birthday", "phone number", "email"],
}
PRODUCTS = "milk bread coffee tea rice honey cheese paper salt sugar silk gold".split()
SYSTEM = ["You are a helpful assistant.", "You are a small demo model.", "Answer in one sentence.", "You can use tools.", "Be brief."]
JSON_HINTS = ["Answer in JSON.", "Answer in JSON.", "Answer in JSON.", "Reply in JSON.", "Respond in JSON.", "Answer as JSON.", "Give the answer as JSON.",
              "Return JSON.", "Answer in JSON only.", "Answer with JSON."]
JSON_SYSTEM = ["Answer in JSON.", "Always answer in JSON.", "You answer in JSON.", "You are a helpful assistant. Answer in JSON.", "Reply in JSON."]
LISTS = [("animals", ["dragon", "fox", "owl"]), ("countries", ["France", "Germany", "Italy"]), ("capitals", ["Paris", "Berlin", "Rome"]),
         ("colors", ["red", "green", "blue"]), ("cities", ["Paris", "London", "Berlin"]), ("numbers", [1, 2, 3])]
NO_WEATHER = "I cannot see the weather without a tool."

# For prompts without sense: a stream of words that ends in a sentence, so that no prompt ends the text at once.
WORDS = """time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work number night point home water room mother area money story fact month lot
right study book eye job word business issue side kind head house service friend father power hour game line end member law car
city community name president team minute idea body information back parent face others level office door health person art war
history party result change morning reason research girl guy moment air teacher force education red green blue black white small
large quick slow the of and to in is it you that he was for on are with as his they at be this from have or one had by but not
what all were when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more two like him see could no make than first been its who now my made over did down only way find use may long
little very after called just where most know request token block layer worker server test prompt cache number random hello""".split()
